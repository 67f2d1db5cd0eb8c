"""A bar on stderr, where the caller asks for one and a person may see it. Its library is imported
only then."""

import sys
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
    """A bar with tqdm's ``options``; without ``progress`` or a terminal, one that shows nothing."""
    if not progress or not sys.stderr.isatty():
        return nullcontext(_NoBar())
    from tqdm import tqdm

    return cast("AbstractContextManager[ProgressBar]", tqdm(**options))
