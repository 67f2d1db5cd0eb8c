"""TLS between router and replicas, with the certificates that Ray itself uses."""

import os
import ssl
from dataclasses import dataclass

from s1engine.engine.ray_cluster import uses_tls
from s1engine.errors import RequestError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of the PEM files of this node."""

    ca: str
    certificate: str
    key: str

    def client_context(self) -> ssl.SSLContext:
        """Verify the replica's certificate and present this node's own. Raises OSError."""
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=self.ca)
        context.load_cert_chain(self.certificate, self.key)
        context.check_hostname = False  # nodes are addressed by IP, certificates need not name it
        return context


def tls_files() -> TlsFiles | None:
    """Return the files that Ray's variables name; None unless RAY_USE_TLS is set.

    Raises RequestError naming a variable that is missing.
    """
    if not uses_tls():
        return None
    paths = []
    for name in ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY"):
        path = os.environ.get(name)
        if not path:
            raise RequestError(f"RAY_USE_TLS is set, but {name} is not", param=name)
        if not os.path.isfile(path):
            raise RequestError(f"{name}: there is no file {path!r}", param=name)
        paths.append(path)
    return TlsFiles(*paths)
