"""What crosses between a server's process and its engine's: msgpack in frames with their length.

Only plain data of known types is ever decoded, so whatever stands in a frame can be refused but
never run. A frame is four bytes of length, little-endian, then the message.
"""

import struct
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from s1engine.config import EngineConfig
from s1engine.engine.core_output import EngineCoreOutputs
from s1engine.engine.request import Request

MAX_FRAME_BYTES = 2**28
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Where an engine stands, and counters since its start."""

    num_blocks: int
    num_free_blocks: int
    num_running: int
    num_waiting: int
    num_preemptions: int
    num_computed_tokens: int
    num_sampled_tokens: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_undrafted: int
    prefix_queries: int
    prefix_hits: int


class Start(msgspec.Struct, tag=True):
    """The first message to an engine."""

    config: EngineConfig
    progress: bool


class AddRequest(msgspec.Struct, tag=True):
    """A request to answer."""

    request: Request


class AbortRequest(msgspec.Struct, tag=True):
    """Nobody waits for this request any more."""

    request_id: str


class EndThinking(msgspec.Struct, tag=True):
    """This request shall answer now."""

    request_id: str


class Ready(msgspec.Struct, tag=True):
    """The first message from an engine whose model is loaded."""

    max_model_len: int
    device: str
    stats: EngineStats


class LoadFailed(msgspec.Struct, tag=True):
    """The same from one that cannot load it: a user's mistake."""

    message: str
    param: str | None
    of_model: bool  # a ModelError, else a RequestError


class Outputs(msgspec.Struct, tag=True):
    """All that one step gave."""

    step: EngineCoreOutputs


class RequestFailed(msgspec.Struct, tag=True):
    """The engine could not go on with this request."""

    number: int
    message: str


class Heartbeat(msgspec.Struct, tag=True):
    """A sign of life, every second (or step, if longer) and when the last request is done."""

    stats: EngineStats


class EngineDied(msgspec.Struct, tag=True):
    """The last message of an engine whose step failed."""

    message: str


ToEngine = Start | AddRequest | AbortRequest | EndThinking
FromEngine = Ready | LoadFailed | Outputs | RequestFailed | Heartbeat | EngineDied


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.astype("<i4", copy=False).tobytes()
    raise NotImplementedError(type(value))


def _rich(kind: type, value: Any) -> Any:
    if kind is np.ndarray:
        return np.frombuffer(value, "<i4")
    raise NotImplementedError(kind)


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
to_engine_decoder: "msgspec.msgpack.Decoder[ToEngine]" = msgspec.msgpack.Decoder(
    ToEngine, dec_hook=_rich
)
from_engine_decoder: "msgspec.msgpack.Decoder[FromEngine]" = msgspec.msgpack.Decoder(
    FromEngine, dec_hook=_rich
)


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """A message as it is sent."""
    return frame_bytes(_encoder.encode(message))


def frame_bytes(body: bytes) -> bytes:
    """A body behind its length, as ``FrameReader`` reads it."""
    assert len(body) <= MAX_FRAME_BYTES, "message is too large"
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Bytes as they come in, whole bodies out."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that ``data`` completes. Raises ConnectionError if a length is absurd."""
        self._data += data
        bodies, at = [], 0
        while len(self._data) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data, at)
            if length > MAX_FRAME_BYTES:
                raise ConnectionError(f"a frame of {length} bytes")
            end = at + _LENGTH.size + length
            if len(self._data) < end:
                break
            bodies.append(bytes(self._data[at + _LENGTH.size : end]))
            at = end
        del self._data[:at]
        return bodies
