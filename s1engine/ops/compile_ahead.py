"""Kernels compiled on all cores before anybody waits for them.

Triton compiles a kernel when it is first launched: hundreds of milliseconds each, one after the
other, and some in the middle of a request. Here what would be launched is compiled side by side,
and nothing runs.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

from tqdm import tqdm

_patching = Lock()


class _Compilers(ThreadPoolExecutor):
    """A thread a core, and a bar. The compiler holds Python's lock for a part of its time only."""

    def __init__(self, bar: Any) -> None:
        super().__init__(os.cpu_count())
        self._bar = bar

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self._bar.total += 1
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(lambda _: self._bar.update())
        return future


@contextmanager
def compiled_ahead(*, progress: bool) -> Iterator[None]:
    """Triton kernels that this thread launches within are compiled and not run: what they would
    have written stays as it is. At the end of the block all are there, except those that do not
    compile: launching one says why."""
    from triton import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    with (
        _patching,
        tqdm(total=0, desc="kernels", unit="kernel", disable=not progress) as bar,
        _Compilers(bar) as compilers,
        AsyncCompileMode(compilers, ignore_errors=True),
    ):
        run, thread = JITFunction.run, get_ident()

        def compile_only(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
            return run(kernel, *args, warmup=warmup or get_ident() == thread, **kwargs)

        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = run
