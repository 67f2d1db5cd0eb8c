"""How many bytes of tensors are alive at most: counted op by op, so the same on every machine."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts while active; tensors made before count once ``watch`` was told of them or an op has
    touched them.

    FSDP shrinks storages without an op. Their last known size is then too large, so the sizes are
    read again whenever the sum of the known ones would make a new peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, Any] = {}  # weak references to storages
        self._known: dict[int, int] = {}
        self._total = 0
        self.peak = 0
        self.at = ""  # the op after which the peak was reached

    def watch(self, *tensors: Any) -> None:
        for tensor in tensors:
            local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
            storage = local.untyped_storage()
            key = storage._cdata
            if key not in self._alive:
                self._alive[key] = weakref.ref(storage, lambda _, key=key: self._gone(key))
            self._set(key, storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        self._total += size - self._known.get(key, 0)
        self._known[key] = size

    def _gone(self, key: int) -> None:
        self._total -= self._known.pop(key)
        del self._alive[key]

    def now(self) -> int:
        for key, reference in list(self._alive.items()):
            storage = reference()
            if storage is not None:
                self._set(key, storage.nbytes())
        return self._total

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor):
                self.watch(leaf)
        if self._total > self.peak and self.now() > self.peak:
            self.peak, self.at = self._total, str(func)
        return out
