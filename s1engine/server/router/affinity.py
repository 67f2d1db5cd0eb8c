"""Which replica a request should go to: where its beginning was computed already, unless too many
are there.

A request's trail is a hash of each of its prefixes: at the end of every message, and every STEP
bytes within a long one. So the next turn of a conversation, or the same examples with another
question, share the beginning of a trail. ``PrefixMap`` remembers who was last sent each prefix, as
a replica keeps computed blocks of it. Knows neither HTTP nor Ray nor tokens.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

PrefixHashes = list[tuple[int, bytes]]  # bytes so far, hash of them

STEP = 512
MAX_STEPS = 128
MAX_PREFIXES = 2**16  # that are remembered, the latest used
SLACK = 16  # requests that a replica may have more than the idlest and still be sent its prefixes
SHARE = 0.25  # of a request that must be known for it to go where it is known
FIELDS = ("system", "instructions", "messages", "input", "prompt")  # that hold text, as read


def trail(body: bytes) -> PrefixHashes:
    """Prefixes of a request, shortest first; none of what is no JSON object with text in it."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return []
    if not isinstance(fields, dict):
        return []
    hashed, length, found = hashlib.blake2b(digest_size=8), 0, []
    for piece in _pieces(fields):
        hashed.update(piece)
        length += len(piece)
        found.append((length, hashed.digest()))
        if len(found) == MAX_STEPS:
            break
    return found


def _pieces(fields: dict[str, Any]) -> Any:
    """The text of a request in parts whose ends are worth remembering."""
    for name in FIELDS:
        value = fields.get(name)
        parts = value if isinstance(value, list) and name in ("messages", "input") else [value]
        for part in parts:
            text = b"" if part is None else msgspec.json.encode(part)
            for begin in range(0, len(text), STEP):
                yield text[begin : begin + STEP]


class PrefixMap:
    """Who was sent what. Replicas are names."""

    def __init__(self, *, slack: int = SLACK) -> None:
        self._slack = slack
        self._owners: OrderedDict[bytes, str] = OrderedDict()

    def place(self, way: PrefixHashes, loads: Mapping[str, int]) -> list[str]:
        """Replicas for a request of trail ``way``, best first; the best will be remembered.

        Args:
            loads: requests under way at each replica that may be chosen; at least one.
        """
        idle = sorted(loads, key=lambda name: (loads[name], _weight(way, name)))
        owner = self._owner(way, loads)
        if owner is not None and loads[owner] <= loads[idle[0]] + self._slack:
            idle.remove(owner)
            idle.insert(0, owner)
        self._remember(way, idle[0])
        return idle

    def _owner(self, way: PrefixHashes, loads: Mapping[str, int]) -> str | None:
        """Who knows most of it, if that is enough."""
        for length, prefix in reversed(way):
            if length < SHARE * way[-1][0]:
                return None
            owner = self._owners.get(prefix)
            if owner in loads:
                return owner
        return None

    def _remember(self, way: PrefixHashes, owner: str) -> None:
        for _, prefix in way:
            self._owners[prefix] = owner
            self._owners.move_to_end(prefix)
        while len(self._owners) > MAX_PREFIXES:
            self._owners.popitem(last=False)


def _weight(way: Sequence[tuple[int, bytes]], name: str) -> bytes:
    """Rendezvous hashing: breaks ties the same way for what begins the same."""
    start = way[0][1] if way else b""
    return hashlib.blake2b(start + name.encode(), digest_size=8).digest()
