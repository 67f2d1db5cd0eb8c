"""Answers whose stream is one block after another: thinking, then text and calls of tools.

Owns what becomes of a chunk in such a stream; how a block looks is each API's own.
"""

from abc import abstractmethod
from collections.abc import Iterable

from s1engine.outputs import CheckpointOutput, Chunk
from s1engine.server.api.response_formatter import Head, ResponseFormatter
from s1engine.server.api.tool_call_parser import (
    CallArguments,
    CallBegin,
    Said,
    ToolCallParser,
    parse_tool_calls,
)


class BlockResponseFormatter(ResponseFormatter):
    """One sample of one prompt.

    Args:
        calls: tools may be called; else what looks like a call is text.
    """

    def __init__(self, head: Head, samples: int, calls: bool) -> None:
        super().__init__(head, samples)
        self._parser = ToolCallParser() if calls else None

    def said(self, text: str) -> Said:
        """Text and calls of a whole answer."""
        return parse_tool_calls(text) if self._parser else Said(text)

    def event(self, prompt: int, event: Chunk | CheckpointOutput) -> Iterable[bytes]:
        """Checkpoints, for which these shapes have no place, come with the usage."""
        if not isinstance(event, Chunk):
            return
        if event.reasoning:
            yield from self.think(event.reasoning)
        if self._parser is None:
            pieces: Iterable[str | CallBegin | CallArguments] = [event.text]
        else:
            pieces = self._parser.push(event.text, last=event.finish_reason is not None)
        for piece in pieces:
            if isinstance(piece, str):
                yield from self.say(piece) if piece else ()
            elif isinstance(piece, CallBegin):
                yield from self.call(piece)
            else:
                yield from self.argue(piece.text)

    @abstractmethod
    def think(self, text: str) -> Iterable[bytes]:
        """Events for more thinking."""

    @abstractmethod
    def say(self, text: str) -> Iterable[bytes]:
        """Events for more text."""

    @abstractmethod
    def call(self, begin: CallBegin) -> Iterable[bytes]:
        """Events for a call that begins."""

    @abstractmethod
    def argue(self, text: str) -> Iterable[bytes]:
        """Events for more of the arguments of the call that began last."""
