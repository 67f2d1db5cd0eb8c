"""Places in the package where a call may fail, and a tracer that acts at one of them.

A place is an instruction: the beginning of a function, a call (which may fail instead of having an
effect), the end of a call whose result is dropped (which may fail after its effect), and a store
into a container. What undoes a request is left out: the blocks of ``finally``, ``except
BaseException`` and ``__exit__``, and all that they call. So are callbacks of the event loop, which
serve all requests.
"""

import ast
import asyncio
import dis
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import s1engine

PACKAGE = str(Path(s1engine.__file__).parent)
ENTRIES = ("RESUME", "RETURN_GENERATOR")
CALLS = ("CALL", "CALL_KW", "CALL_FUNCTION_EX")


@dataclass(frozen=True)
class Place:
    """One instruction; ``after``: the call before it has been made."""

    code: CodeType
    offset: int
    after: bool
    line: int

    def __str__(self) -> str:
        side = "after" if self.after else "at"
        return f"{side} {Path(self.code.co_filename).name}:{self.line} ({self.code.co_qualname})"


@functools.cache
def undoing_lines(filename: str) -> frozenset[int]:
    """Lines of a file that undo."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(Path(filename).read_text())):
        blocks: list[Any] = []
        if isinstance(node, ast.Try):
            blocks = [*node.finalbody, *(h for h in node.handlers if catches_all(h))]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            blocks = [node] if node.name in ("__exit__", "__aexit__") else []
        for block in blocks:
            lines.update(range(block.lineno, block.end_lineno + 1))
    return frozenset(lines)


def catches_all(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.type, ast.Name) and handler.type.id == "BaseException"


def undoes(frame: FrameType | None) -> bool:
    """Is this frame, or one that has called it, undoing?"""
    while frame is not None:
        filename = frame.f_code.co_filename
        if filename.startswith(PACKAGE) and frame.f_lineno in undoing_lines(filename):
            return True
        frame = frame.f_back
    return False


class Tracer:
    """Counts the visits of places; calls ``act`` at one visit of one place.

    Args:
        act: may raise.
        at: the place and the number of the visit; None: only count.
        only_entries: only the beginnings of functions, and of their parts after an ``await``.
    """

    def __init__(
        self,
        act: Callable[[], None] = lambda: None,
        at: tuple[Place, int] | None = None,
        *,
        only_entries: bool = False,
    ) -> None:
        self.visits: Counter[Place] = Counter()
        self.acted = False
        self._act = act
        self._at = at
        self._only_entries = only_entries
        self._last: dict[FrameType, int] = {}

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "call":
            if self._at is not None and frame.f_code is not self._at[0].code:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            last = self._last.get(frame)
            self._last[frame] = frame.f_lasti
            after = self._is_place(frame, last)
            if after is not None:
                self._visit(frame, after)
        elif event == "return":
            self._last.pop(frame, None)
        return self

    def _is_place(self, frame: FrameType, last: int | None) -> bool | None:
        """Is the next instruction a place? Returns ``after`` if it is one."""
        names = operation_names(frame.f_code)
        name = names[frame.f_lasti]
        if last is None:  # the beginning, or what follows an await
            return False if name in ENTRIES or self._only_entries else None
        if self._only_entries:
            return None
        if name in CALLS or name == "STORE_SUBSCR":
            return None if frame.f_lasti in exit_calls(frame.f_code) else False
        return True if name == "POP_TOP" and names[last] in CALLS else None

    def _visit(self, frame: FrameType, after: bool) -> None:
        code, offset = frame.f_code, frame.f_lasti
        try:
            if asyncio.current_task() is None:
                return
        except RuntimeError:  # no event loop
            return
        if self._at is not None:
            place, visit = self._at
            if code is not place.code or offset != place.offset or after is not place.after:
                return
        if undoes(frame):
            return
        here = Place(code, offset, after, frame.f_lineno)
        self.visits[here] += 1
        if self._at is not None and self.visits[here] == visit:
            self.acted = True
            self._last.clear()
            sys.settrace(None)
            self._act()

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Traces this thread."""
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(None)


@functools.cache
def operation_names(code: CodeType) -> dict[int, str]:
    """The name of the instruction at each offset."""
    return {each.offset: each.opname for each in dis.get_instructions(code)}


@functools.cache
def exit_calls(code: CodeType) -> frozenset[int]:
    """Offsets of the calls of ``__exit__`` and ``__aexit__`` at the end of blocks: those with three
    times None."""
    calls, nones = set(), 0
    for each in dis.get_instructions(code):
        if each.opname in CALLS and nones >= 3:
            calls.add(each.offset)
        if each.opname == "LOAD_CONST" and each.argval is None:
            nones += 1
        elif each.opname != "PRECALL":
            nones = 0
    return frozenset(calls)
