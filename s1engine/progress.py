"""A bar on stderr, where the caller asks for one. Its library is imported only then."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast


class ProgressBar(Protocol):
    """What counts the work of a bar."""

    total: Any

    def update(self, n: float = 1) -> Any: ...


class _NoBar:
    total: Any = 0

    def update(self, n: float = 1) -> None:
        """Shows nothing."""


def progress_bar(progress: bool, **options: Any) -> AbstractContextManager[ProgressBar]:
    """A bar with tqdm's ``options``; without ``progress``, one that shows nothing."""
    if not progress:
        return nullcontext(_NoBar())
    from tqdm import tqdm

    return cast("AbstractContextManager[ProgressBar]", tqdm(**options))
