"""Target ``frames``: bytes between the server's process and the engine's.

The first byte is the size of the pieces in which the others arrive. A stream of frames does not
depend on its pieces; a body is a message or is refused by msgspec; a message survives encoding; the
records of a step are decoded or refused, in C++ and in Python alike.
"""

import struct
from typing import Any

import msgspec

from s1engine import _core
from s1engine.engine import messages
from s1engine.engine.core_output import SEQUENCE_BITS, decode_core_outputs
from tests.fuzz.target import Target

DECODERS: "tuple[msgspec.msgpack.Decoder[Any], ...]" = (
    messages.to_engine_decoder,
    messages.from_engine_decoder,
)


def _bodies(stream: bytes, size: int) -> list[bytes] | None:
    """The bodies of a stream that arrives in pieces; None if it is refused."""
    reader, bodies = messages.FrameReader(), []
    try:
        for at in range(0, len(stream), size):
            bodies += reader.feed(stream[at : at + size])
    except ConnectionError:
        return None
    return bodies


def _check_body(body: bytes) -> None:
    for decoder in DECODERS:
        try:
            message = decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        (again,) = messages.FrameReader().feed(messages.encode_frame(message))
        assert messages.encode_frame(decoder.decode(again))[4:] == again
        if isinstance(message, messages.Outputs):
            _check_records(message.outputs.records)


def _check_records(records: bytes) -> None:
    collector = _core.OutputCollector(sequence_bits=SEQUENCE_BITS)
    try:
        numbers = {output.seq_id >> SEQUENCE_BITS for output in decode_core_outputs(records)}
    except (struct.error, IndexError):
        numbers = set()
    for number in numbers:
        collector.open(number)
    try:
        collector.add(records)
    except ValueError:
        return
    for number in numbers:
        list(decode_core_outputs(collector.collect(number)))


def run(data: bytes) -> None:
    size, stream = (data[0], data[1:]) if data else (0, b"")
    whole = _bodies(stream, max(len(stream), 1))
    if size:
        assert _bodies(stream, size) == whole
    for body in whole or ():
        _check_body(body)
    _check_body(stream)
    _check_records(stream)


WORDS = [
    kind.__name__.encode() for kind in (*messages.ToEngine.__args__, *messages.FromEngine.__args__)
]
WORDS += [
    name.encode() for kind in (messages.Outputs, messages.Ready) for name in kind.__struct_fields__
]
TARGETS = {"frames": Target(run, WORDS)}
