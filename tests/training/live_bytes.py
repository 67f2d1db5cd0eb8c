"""Peak of live tensor bytes, counted op by op, so it is the same on every machine."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts while active. Older tensors count after ``watch`` or after an op has used them.

    FSDP shrinks storages without an op, so a remembered size may be too large. All sizes are read
    again before a new peak is recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, Any] = {}  # weak references to storages
        self._sizes: dict[int, int] = {}
        self._total = 0
        self.peak = 0
        self.peak_op = ""  # the op that reached the peak

    def watch(self, *tensors: Any) -> None:
        for tensor in tensors:
            local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
            storage = local.untyped_storage()
            key = storage._cdata
            if key not in self._alive:
                self._alive[key] = weakref.ref(storage, lambda _, key=key: self._remove(key))
            self._set(key, storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        self._total += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _remove(self, key: int) -> None:
        self._total -= self._sizes.pop(key)
        del self._alive[key]

    def _recount(self) -> int:
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
        if self._total > self.peak and self._recount() > self.peak:
            self.peak, self.peak_op = self._total, str(func)
        return out
