"""The number of threads of the CPU kernels, which all engines of a process share.

There is one thread pool for a process. An engine that asks for a number gets it, or is refused if
another live engine has a different one; an engine that does not ask joins. When the last engine
closes, the pool's threads end, and with them their scratch memory.
"""

from threading import Lock
from weakref import WeakSet

import torch

from s1engine._core import cpu
from s1engine.errors import RequestError

_lock = Lock()
_leases: WeakSet["ThreadLease"] = WeakSet()


class ThreadLease:
    """A claim of one engine on the pool, until ``close``.

    Args:
        num_threads: of a kernel, the calling one included; None: the number that another engine
            has asked for, else torch's.

    Raises:
        RequestError: a live engine of this process uses another number.
    """

    def __init__(self, num_threads: int | None) -> None:
        with _lock:
            if num_threads is not None and _leases and cpu.num_threads() != num_threads:
                raise RequestError(
                    f"num_threads {num_threads}: another engine of this process uses "
                    f"{cpu.num_threads()}, and they share one thread pool; close it, or use the "
                    "same number",
                    param="num_threads",
                )
            self._asked = num_threads is not None
            if not any(lease._asked for lease in _leases):
                cpu.set_num_threads(num_threads or torch.get_num_threads())
            _leases.add(self)

    def close(self) -> None:
        """Gives the claim back; the last one ends the pool's threads. May be called again."""
        with _lock:
            if self in _leases:
                _leases.remove(self)
                if not _leases:
                    cpu.set_num_threads(1)
