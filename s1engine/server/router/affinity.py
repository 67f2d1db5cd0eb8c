"""Which replica a request should go to: where its prefix was computed, unless that one is too busy.

A request has a hash for each of its prefixes: one at the end of every message, and one every STEP
bytes of a long message. So the next turn of a conversation, or the same examples with another
question, share their first hashes. ``PrefixMap`` remembers which replica each prefix was last sent
to, because that replica holds its KV blocks. Knows neither HTTP nor Ray nor tokens.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

PrefixHashes = list[tuple[int, bytes]]  # length of each prefix in bytes, and its hash

STEP = 512
MAX_STEPS = 128
MAX_PREFIXES = 2**16  # remembered, the most recently used
SLACK = 16  # requests that the owner of a prefix may have in flight beyond the idlest replica
SHARE = 0.25  # least part of a request that must be known for it to go to the owner
FIELDS = ("system", "instructions", "messages", "input", "prompt")  # of text, in reading order

logger = logging.getLogger(__name__)


def prefix_hashes(body: bytes) -> PrefixHashes:
    """Hash the prefixes of a request, shortest first; none unless it is a JSON object with text."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return []
    if not isinstance(fields, dict):
        return []
    hasher, length = hashlib.blake2b(digest_size=8), 0
    hashes: PrefixHashes = []
    for piece in _pieces(fields):
        hasher.update(piece)
        length += len(piece)
        hashes.append((length, hasher.digest()))
        if len(hashes) == MAX_STEPS:
            break
    return hashes


def _pieces(fields: dict[str, Any]) -> Iterator[bytes]:
    """Yield the text of a request, cut where a prefix may end."""
    for name in FIELDS:
        value = fields.get(name)
        parts = value if isinstance(value, list) and name in ("messages", "input") else [value]
        for part in parts:
            text = b"" if part is None else msgspec.json.encode(part)
            for begin in range(0, len(text), STEP):
                yield text[begin : begin + STEP]


class PrefixMap:
    """Remembers which replica, by name, owns each prefix."""

    def __init__(self, *, slack: int = SLACK) -> None:
        self._slack = slack
        self._owners: OrderedDict[bytes, str] = OrderedDict()

    def rank(self, hashes: PrefixHashes, loads: Mapping[str, int]) -> list[str]:
        """Return replicas for a request, best first, and remember the best as the owner.

        Args:
            loads: requests in flight at each replica that may be chosen; at least one.
        """
        ranked = sorted(loads, key=lambda name: (loads[name], _tie_break(hashes, name)))
        owner = self._owner(hashes, loads)
        if owner is not None and loads[owner] <= loads[ranked[0]] + self._slack:
            ranked.remove(owner)
            ranked.insert(0, owner)
        reason = "owner of the prefix" if ranked[0] == owner else "least loaded"
        logger.debug("chose %s (%s) by loads %s", ranked[0], reason, loads)
        self._remember(hashes, ranked[0])
        return ranked

    def _owner(self, hashes: PrefixHashes, loads: Mapping[str, int]) -> str | None:
        """Return the replica that knows the longest prefix, if that is long enough."""
        for length, prefix in reversed(hashes):
            if length < SHARE * hashes[-1][0]:
                return None
            owner = self._owners.get(prefix)
            if owner in loads:
                return owner
        return None

    def _remember(self, hashes: PrefixHashes, owner: str) -> None:
        for _, prefix in hashes:
            self._owners[prefix] = owner
            self._owners.move_to_end(prefix)
        while len(self._owners) > MAX_PREFIXES:
            self._owners.popitem(last=False)


def _tie_break(hashes: PrefixHashes, name: str) -> bytes:
    """Rendezvous hashing: equal beginnings break ties in the same way in every router."""
    start = hashes[0][1] if hashes else b""
    return hashlib.blake2b(start + name.encode(), digest_size=8).digest()
