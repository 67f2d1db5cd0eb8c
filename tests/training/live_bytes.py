"""How many bytes of tensors are alive at most: counted op by op, so the same on every machine."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Counts while active; tensors made before count once ``watch`` was told of them or an op has
    touched them."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: Any = WeakIdKeyDictionary()
        self.peak = 0
        self.at = ""  # the op after which the peak was reached

    def watch(self, *tensors: Any) -> None:
        for tensor in tensors:
            local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
            self._storages[local.untyped_storage()] = None

    def now(self) -> int:
        return sum(storage.nbytes() for storage in list(self._storages))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor):
                self.watch(leaf)
        alive = self.now()
        if alive > self.peak:
            self.peak = alive
            self.at = str(func)
        return out
