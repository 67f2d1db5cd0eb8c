"""Messages between a server's process and its engine's process: msgpack in length-prefixed frames.

Only plain data of known types is decoded, so a malformed frame can be rejected but never executed.
A frame is four bytes of length, little-endian, then the message.
"""

import struct
from typing import Any

import msgspec
import numpy as np

from s1engine.config import EngineConfig
from s1engine.engine.core_output import EngineCoreOutputs, EngineStats
from s1engine.engine.request import Request

MAX_FRAME_BYTES = 2**28
_LENGTH = struct.Struct("<I")


class Start(msgspec.Struct, tag=True):
    """The first message to an engine process."""

    config: EngineConfig
    progress: bool


class AddRequest(msgspec.Struct, tag=True):
    """A new request."""

    request: Request


class AbortRequest(msgspec.Struct, tag=True):
    """The client has closed this request."""

    request_id: str


class EndThinking(msgspec.Struct, tag=True):
    """The client wants the answer of this request now."""

    request_id: str


class Ready(msgspec.Struct, tag=True):
    """The first message from an engine process whose model is loaded."""

    max_model_len: int
    device: str
    stats: EngineStats


class LoadFailed(msgspec.Struct, tag=True):
    """Instead of Ready: the model cannot be loaded because of a user error."""

    message: str
    param: str | None
    of_model: bool  # a ModelError, else a RequestError


class Outputs(msgspec.Struct, tag=True):
    """The output of one step."""

    outputs: EngineCoreOutputs


class RequestFailed(msgspec.Struct, tag=True):
    """One request failed alone."""

    number: int
    message: str


class StatsReport(msgspec.Struct, tag=True):
    """Every second, or every step if that takes longer, and when the last request finishes."""

    stats: EngineStats


class Heartbeat(msgspec.Struct, tag=True):
    """A sign of life, every second, from a thread that does nothing else. It is left out while
    other messages wait to be sent."""

    stalled: float  # seconds in which the engine had work and completed no step


class EngineDied(msgspec.Struct, tag=True):
    """The last message of an engine that could not load, or whose step failed."""

    message: str


ToEngine = Start | AddRequest | AbortRequest | EndThinking
FromEngine = Ready | LoadFailed | Outputs | RequestFailed | StatsReport | Heartbeat | EngineDied


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.astype("<i4", copy=False).tobytes()
    raise NotImplementedError(type(value))


def _decode_array(kind: type, value: Any) -> Any:
    if kind is np.ndarray:
        return np.frombuffer(value, "<i4")
    raise TypeError(f"{kind.__name__} does not cross processes")  # msgspec refuses the message


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
to_engine_decoder: "msgspec.msgpack.Decoder[ToEngine]" = msgspec.msgpack.Decoder(
    ToEngine, dec_hook=_decode_array
)
from_engine_decoder: "msgspec.msgpack.Decoder[FromEngine]" = msgspec.msgpack.Decoder(
    FromEngine, dec_hook=_decode_array
)


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """A message as one frame."""
    body = _encoder.encode(message)
    assert len(body) <= MAX_FRAME_BYTES, "message is too large"
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Splits a stream of bytes into the bodies of frames."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that ``data`` completes. Raises ConnectionError if a frame is too long."""
        self._data += data
        bodies, at = [], 0
        while len(self._data) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data, at)
            if length > MAX_FRAME_BYTES:
                raise ConnectionError(f"a frame of {length} bytes; the limit is {MAX_FRAME_BYTES}")
            end = at + _LENGTH.size + length
            if len(self._data) < end:
                break
            bodies.append(bytes(self._data[at + _LENGTH.size : end]))
            at = end
        del self._data[:at]
        return bodies
