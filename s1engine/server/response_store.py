"""Finished responses that clients may refer to later, in memory.

Bounded by bytes: the client with the most loses those that it has not used for longest, so no
client costs another its responses. Each client sees only its own. Knows no HTTP.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from s1engine.checks import shown
from s1engine.errors import RequestError
from s1engine.server.api.body import JsonObject, JsonObjects
from s1engine.server.middleware import VALUE_BYTES

MAX_STORED_BYTES = 64 * 2**20
STORED_AGE_S = 24 * 3600  # since the last use
RESPONSE_BYTES = 1024  # of a response, beside its texts


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response and the input that it answers, as JSON."""

    response: bytes
    """Without its output."""
    input: bytes
    """A list of items."""
    output: tuple[bytes, ...]
    previous: str | None
    """The id of the response that it continues."""

    @classmethod
    def of(cls, response: JsonObject, items: JsonObjects) -> "StoredResponse":
        """Encode a response and the items of its input."""
        encode = msgspec.json.encode
        output = tuple(encode(item) for item in response["output"])
        head = encode({**response, "output": []})
        return cls(head, encode(items), output, response["previous_response_id"])

    @property
    def num_bytes(self) -> int:
        """What it counts in the store."""
        return RESPONSE_BYTES + len(self.response) + len(self.input) + sum(map(len, self.output))

    def items(self) -> JsonObjects:
        """Return the items of input and output."""
        decode = msgspec.json.decode
        return [*decode(self.input), *map(decode, self.output)]

    def to_json(self) -> JsonObject:
        """Return the response."""
        decode = msgspec.json.decode
        return {**decode(self.response), "output": [*map(decode, self.output)]}


def parsed_bytes(texts: Sequence[bytes]) -> int:
    """Estimate the memory of JSON texts when they are parsed."""
    separators = sum(text.count(b",") + text.count(b"[") + text.count(b"{") for text in texts)
    return 2 * sum(map(len, texts)) + VALUE_BYTES * separators


class ResponseStore:
    """Stores responses by client and id. All calls come from one event loop.

    Args:
        max_bytes: of all responses; 0: nothing is stored.
        clock: returns seconds.
    """

    def __init__(
        self, max_bytes: int = MAX_STORED_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._clock = clock
        self._clients: dict[str, _ClientResponses] = {}

    def add(self, client: str, name: str, stored: StoredResponse) -> None:
        """Store a response; one that is larger than the store is dropped."""
        if stored.num_bytes > self.max_bytes:
            return
        self._clients.setdefault(client, _ClientResponses()).add(name, stored, self._clock())
        self.num_bytes += stored.num_bytes
        for other in list(self._clients):
            self._remove_old(other)
        while self.num_bytes > self.max_bytes:
            largest = max(self._clients, key=lambda name: self._clients[name].num_bytes)
            self._drop(largest, self._clients[largest].first())

    def get(self, client: str, name: str) -> StoredResponse | None:
        """Return a response, which is then the last used one."""
        self._remove_old(client)
        responses = self._clients.get(client)
        return None if responses is None else responses.use(name, self._clock())

    def remove(self, client: str, name: str) -> bool:
        """Remove a response. Returns False if there is none."""
        if self.get(client, name) is None:
            return False
        self._drop(client, name)
        return True

    def conversation(self, client: str, name: str, max_bytes: int) -> list[StoredResponse]:
        """Return a response and those before it in its conversation, oldest first.

        Raises RequestError naming ``previous_response_id`` if one is not stored, or if they have
        more than ``max_bytes``.
        """
        param = "previous_response_id"
        found: list[StoredResponse] = []
        size = 0
        before: str | None = name
        while before is not None:
            stored = self.get(client, before)
            if stored is None:
                raise _not_stored(param, before)
            found.append(stored)
            size, before = size + stored.num_bytes, stored.previous
            if size > max_bytes:
                message = f"{param}: the conversation has more than {max_bytes} bytes"
                raise RequestError(message, param=param)
        return found[::-1]

    def item(self, client: str, name: object, place: str) -> bytes:
        """Return an item of an output. Raises RequestError naming the ``place``."""
        _, _, rest = name.partition("_") if isinstance(name, str) else ("", "", "")
        response, _, index = rest.rpartition("_")
        stored = self.get(client, response)
        if stored is None or not (index.isdecimal() and index.isascii() and len(index) < 9):
            raise _not_stored(place, name)
        if int(index) >= len(stored.output):
            raise _not_stored(place, name)
        return stored.output[int(index)]

    def _remove_old(self, client: str) -> None:
        while (responses := self._clients.get(client)) is not None:
            if responses.oldest_use() > self._clock() - STORED_AGE_S:
                return
            self._drop(client, responses.first())

    def _drop(self, client: str, name: str) -> None:
        responses = self._clients[client]
        self.num_bytes -= responses.remove(name)
        if not responses.num_bytes:
            del self._clients[client]


class _ClientResponses:
    """The responses of one client, the last used one last."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._responses: OrderedDict[str, tuple[StoredResponse, float]] = OrderedDict()

    def add(self, name: str, stored: StoredResponse, now: float) -> None:
        self._responses[name] = stored, now
        self.num_bytes += stored.num_bytes

    def use(self, name: str, now: float) -> StoredResponse | None:
        stored, _ = self._responses.get(name, (None, 0.0))
        if stored is not None:
            self._responses[name] = stored, now
            self._responses.move_to_end(name)
        return stored

    def remove(self, name: str) -> int:
        """Return the bytes that this frees."""
        stored, _ = self._responses.pop(name)
        self.num_bytes -= stored.num_bytes
        return stored.num_bytes

    def first(self) -> str:
        return next(iter(self._responses))

    def oldest_use(self) -> float:
        return self._responses[self.first()][1]


def _not_stored(param: str, name: object) -> RequestError:
    return RequestError(
        f"{param}: nothing is stored as {shown(name)}: send store: false and the whole input",
        param=param,
        code="previous_response_not_found",
    )
