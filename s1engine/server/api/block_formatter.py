"""Formatter of streams that are a sequence of blocks: thinking, then text and tool calls.

Splits each chunk into parts of blocks; each API formats a block in its own way.
"""

from abc import abstractmethod
from collections.abc import Iterable

from s1engine.outputs import CheckpointOutput, Chunk
from s1engine.server.api.call_syntax import ToolCall
from s1engine.server.api.response_formatter import ResponseFormatter, ResponseHead
from s1engine.server.api.tool_call_parser import CallArguments, CallBegin, ToolCallParser


class BlockResponseFormatter(ResponseFormatter):
    """Formats one sample of one prompt.

    Args:
        parser: of the answer; None: text that looks like a call stays text.
    """

    def __init__(self, head: ResponseHead, samples: int, parser: ToolCallParser | None) -> None:
        super().__init__(head, samples)
        self._parser = parser

    def answer_blocks(self, text: str) -> list[str | ToolCall]:
        """Split a complete answer into texts and tool calls, in their order."""
        if self._parser is None:
            return [text] if text else []
        blocks: list[str | ToolCall] = []
        for piece in self._parser.push(text, last=True):
            last = blocks[-1] if blocks else None
            if isinstance(piece, CallBegin):
                blocks.append(ToolCall(piece.name))
            elif isinstance(piece, CallArguments):
                assert isinstance(last, ToolCall)
                last.arguments += piece.text
            elif isinstance(last, str):
                blocks[-1] = last + piece
            else:
                blocks.append(piece)
        return blocks

    def chunk_events(self, prompt: int, event: Chunk | CheckpointOutput) -> Iterable[bytes]:
        """Format a chunk; checkpoints are reported with the usage instead."""
        if not isinstance(event, Chunk):
            return
        if event.reasoning:
            yield from self.reasoning_events(event.reasoning)
        if self._parser is None:
            pieces: Iterable[str | CallBegin | CallArguments] = [event.text]
        else:
            pieces = self._parser.push(event.text, last=event.finish_reason is not None)
        for piece in pieces:
            if isinstance(piece, str):
                yield from self.text_events(piece) if piece else ()
            elif isinstance(piece, CallBegin):
                yield from self.tool_call_events(piece)
            else:
                yield from self.argument_events(piece.text)

    @abstractmethod
    def reasoning_events(self, text: str) -> Iterable[bytes]:
        """Return the events for more thinking."""

    @abstractmethod
    def text_events(self, text: str) -> Iterable[bytes]:
        """Return the events for more text."""

    @abstractmethod
    def tool_call_events(self, begin: CallBegin) -> Iterable[bytes]:
        """Return the events for the begin of a tool call."""

    @abstractmethod
    def argument_events(self, text: str) -> Iterable[bytes]:
        """Return the events for more arguments of the current tool call."""
