"""What the server did otherwise than a request says: unknown fields that it ignored, limits that it
lowered. The response's headers and the log report both.

Knows no schema. Validators of nested objects reach the notes of their request through a context
variable.
"""

import re
from collections.abc import Iterable
from contextvars import ContextVar

IGNORED = b"x-s1engine-ignored"
LOWERED = b"x-s1engine-lowered"
MAX_UNKNOWN_FIELDS = 24  # of one request; more are an error
MAX_NAME_CHARS = 64  # of an unknown field, in the header and the log
MAX_LOGGED_NAMES = 1024  # fields that the log names; later ones it leaves out
NOT_IN_HEADERS = re.compile(r"[^A-Za-z0-9_.\[\]-]")


class RequestNotes:
    """The notes of one request.

    Args:
        strict: unknown fields are errors.
    """

    def __init__(self, *, strict: bool = True) -> None:
        self.strict = strict
        self.ignored: dict[str, None] = {}  # fields, in their order
        self.lowered: dict[str, int] = {}  # fields and the values that hold

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the response headers."""
        headers = [(IGNORED, _joined(self.ignored))] if self.ignored else []
        if self.lowered:
            pairs = (f"{name}={value}".encode() for name, value in self.lowered.items())
            headers.append((LOWERED, b", ".join(pairs)))
        return headers


def _joined(names: Iterable[str]) -> bytes:
    return b", ".join(header_safe(name).encode() for name in names)


def header_safe(name: str) -> str:
    """Return a field's name for a header or a line of the log: short, plain characters only."""
    return NOT_IN_HEADERS.sub("?", name[:MAX_NAME_CHARS])


NOTES: ContextVar[RequestNotes] = ContextVar("NOTES")


def current_notes() -> RequestNotes:
    """Return the notes of the current request; strict ones outside of any."""
    return NOTES.get(None) or RequestNotes()
