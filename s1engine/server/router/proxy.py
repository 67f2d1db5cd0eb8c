"""The router's HTTP client: sends a request on to one replica and yields the response as it comes.

Owns a reverse proxy's rules: which headers pass in which direction, and that a truncated response
is an error. A slow client slows the replica down through TCP. Knows neither Ray nor how a replica
is chosen.
"""

import io
import logging
import socket
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.types import Message, Scope

from s1engine.server.middleware import REQUEST_ID
from s1engine.server.router.replica_gate import CLIENT, INTERNAL_PREFIX, NOT_BEGUN
from s1engine.server.router.tls import TlsFiles

if TYPE_CHECKING:
    from aiohttp import ClientSession

CONNECT_S = 10.0
IDLE_CONNECTION_S = 60.0  # a replica keeps connections longer, so none closes under a new request
PROBE_S, PROBES = 5, 4  # of TCP keep-alive
LARGE_BODY_BYTES = 2**20  # written in pieces
HOP_BY_HOP = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization"),
    *(b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
}
NOT_FORWARDED = HOP_BY_HOP | {
    *(b"host", b"content-length", b"expect", b"authorization", b"x-api-key", REQUEST_ID),
}
NOT_RETURNED = HOP_BY_HOP | {b"date", b"server", REQUEST_ID}
AUTOMATIC_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")  # of aiohttp
PRINTABLE = bytes(range(33, 127))

Headers = list[tuple[bytes, bytes]]

logger = logging.getLogger(__name__)


class ReplicaLostError(RuntimeError):
    """The replica does not answer, or not to the end; there is none if ``name`` is None."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__("there is no replica" if name is None else f"replica {name} was lost")
        self.name = name


@dataclass(frozen=True, slots=True)
class ReplicaAddress:
    """Where a replica's HTTP server listens."""

    name: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class ForwardedRequest:
    """An HTTP request as a replica gets it, but for the token."""

    method: str
    target: str  # path and query, percent-encoded
    headers: Headers
    body: bytes = b""
    request_id: str = ""


def forwarded_request(scope: Scope, body: bytes) -> ForwardedRequest:
    """Build the request for a replica: the client's headers that may pass, and the router's."""
    path = scope.get("raw_path") or scope["path"].encode()
    query = scope.get("query_string", b"")
    target = quote(path + (b"?" + query if query else b""), PRINTABLE)
    state = scope["state"]
    headers = _passing(scope["headers"], NOT_FORWARDED)
    headers.append((REQUEST_ID, state["request_id"].encode()))
    if "client" in state:
        headers.append((CLIENT, state["client"].encode()))
    target = target if target.startswith("/") else "/" + target
    return ForwardedRequest(scope["method"], target, headers, body, state["request_id"])


def _passing(headers: Iterable[tuple[bytes, bytes]], dropped: set[bytes]) -> Headers:
    """Headers that a proxy passes on: neither ``dropped``, internal, nor named by Connection."""
    lower = [(name.lower(), value) for name, value in headers]
    named = {
        option.strip().lower()
        for name, value in lower
        if name == b"connection"
        for option in value.split(b",")
    }
    return [
        (name, value)
        for name, value in lower
        if name not in dropped and name not in named and not name.startswith(INTERNAL_PREFIX)
    ]


def open_session(tls: TlsFiles | None) -> "ClientSession":
    """The connections to all replicas. Needs a running event loop."""
    import aiohttp

    context: Any = True if tls is None else tls.client_context()
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=0,
            keepalive_timeout=IDLE_CONNECTION_S,
            ssl=context,
            socket_factory=_keepalive_socket,
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        auto_decompress=False,
        skip_auto_headers=AUTOMATIC_HEADERS,
    )


def _keepalive_socket(address: Any) -> socket.socket:
    """Create a socket that fails within PROBE_S * PROBES seconds if the replica's node is gone."""
    created = socket.socket(*address[:3])
    created.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, PROBE_S),
        (socket.TCP_KEEPINTVL, PROBE_S),
        (socket.TCP_KEEPCNT, PROBES),
    ):
        created.setsockopt(socket.IPPROTO_TCP, option, value)
    created.setblocking(False)
    return created


class ReplicaClient:
    """Requests to one replica.

    Args:
        session: shared by all replicas.
        token: of the cluster.
    """

    def __init__(
        self, address: ReplicaAddress, session: "ClientSession", token: str, *, https: bool
    ) -> None:
        self.name = address.name
        self.closed = False  # takes no new requests
        self.num_in_flight = 0
        self._session = session
        host = f"[{address.host}]" if ":" in address.host else address.host
        self._origin = f"{'https' if https else 'http'}://{host}:{address.port}"
        self._authorization = ("authorization", f"Bearer {token}")

    async def forward(self, request: ForwardedRequest) -> AsyncGenerator[Message, None]:
        """Yield the ASGI messages of the response; the first one when the engine has begun.

        What arrives faster than it is consumed is joined. Closing the generator cancels the request
        at the replica. Raises ReplicaLostError.
        """
        import aiohttp
        from yarl import URL

        headers = [self._authorization, *_decoded(request.headers)]
        body = io.BytesIO(request.body) if len(request.body) > LARGE_BODY_BYTES else request.body
        url = URL(self._origin + request.target, encoded=True)
        self.num_in_flight += 1
        try:
            async with self._session.request(
                request.method, url, headers=headers, data=body or None, allow_redirects=False
            ) as response:
                if NOT_BEGUN.decode() in response.headers:
                    self.closed = True
                    raise ReplicaLostError(self.name)
                returned = _passing(response.raw_headers, NOT_RETURNED)
                returned.append((b"x-replica", self.name.encode()))
                start = {"type": "http.response.start", "status": response.status}
                yield {**start, "headers": returned}
                content, complete = response.content, False
                while not complete:
                    text = await content.readany()
                    complete = content.at_eof()
                    yield {"type": "http.response.body", "body": text, "more_body": not complete}
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            self.closed |= isinstance(error, aiohttp.ClientConnectorError)
            logger.debug("replica %s was lost: %r", self.name, error)
            raise ReplicaLostError(self.name) from error
        finally:
            self.num_in_flight -= 1

    async def fetch(self, method: str, target: str) -> tuple[int, bytes]:
        """Return status and body of a request without headers and body. Raises ReplicaLostError."""
        status, parts = 0, []
        async for message in self.forward(ForwardedRequest(method, target, [])):
            status = message.get("status", status)
            parts.append(message.get("body", b""))
        return status, b"".join(parts)


def _decoded(headers: Headers) -> list[tuple[str, str]]:
    """Headers as aiohttp takes them; it encodes values as UTF-8 again, so others are dropped."""
    decoded = []
    for name, value in headers:
        try:
            decoded.append((name.decode(), value.decode()))
        except UnicodeDecodeError:
            logger.debug("dropped the header %r, which is not UTF-8", name)
    return decoded
