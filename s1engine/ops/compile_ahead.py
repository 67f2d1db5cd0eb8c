"""Compiles Triton kernels on all cores before the first request.

Triton compiles a kernel at its first launch: hundreds of milliseconds each, one after the other,
some in the middle of a request. Here the launches compile in parallel and nothing runs.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

from s1engine.progress import progress_bar

_patching = Lock()


class _Compilers(ThreadPoolExecutor):
    """A thread per core, and a progress bar. The compiler mostly runs without Python's lock."""

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
    """Kernels that this thread launches within the block are compiled and not run: their outputs
    stay as they were. The block ends when all are compiled. A kernel that fails to compile raises
    at its next launch."""
    from triton import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    with (
        _patching,
        progress_bar(progress, total=0, desc="kernels", unit="kernel") as bar,
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
