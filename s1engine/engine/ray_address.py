"""Is there a Ray cluster at an address, and does it let us in?

Asked before Ray joins it, which would try for minutes and then say neither. A cluster that asks for
a token gets the one that Ray finds ($RAY_AUTH_TOKEN, $RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token); by
itself Ray sends none to an address that it is given. Knows nothing of what runs there.
"""

import os
from typing import Any

from s1engine.errors import RequestError

ANSWER_S = 5.0
# Anything that a cluster knows before it is joined; its empty request is no bytes.
CALL = "/ray.rpc.NodeInfoGcsService/GetClusterId"
SET = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or write it to ~/.ray/auth_token"


def check_syntax(address: str | None) -> None:
    """Raises RequestError for an address that cannot do; needs no Ray."""
    if address is not None and address.startswith("ray://"):
        raise wrong_address(
            address, "Ray's client protocol cannot stream; give host:port of the cluster, or auto"
        )


def check_cluster(address: str) -> None:
    """Raises RequestError unless a cluster answers there that takes our token, if it asks for one;
    from then on this process uses that token."""
    import grpc
    from ray._private import services

    try:
        place = services.canonicalize_bootstrap_address_or_die(address)
        services.extract_ip_port(place)
    except (ConnectionError, ValueError) as error:
        raise wrong_address(address, str(error)) from error
    if uses_tls():
        return  # then Ray's own certificates decide
    code = _answer(place, None)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        code = _answer(place, _token(address))
        if code is grpc.StatusCode.UNAUTHENTICATED:
            raise wrong_address(address, f"the cluster does not accept this token; {SET}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        raise wrong_address(address, "what answers there is no Ray cluster")
    if code is not grpc.StatusCode.OK:
        raise wrong_address(address, f"no Ray cluster answers there ({code.name.lower()})")


def uses_tls() -> bool:
    """Does Ray encrypt, and show certificates? As Ray itself reads its variable."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def wrong_address(address: str, why: str) -> RequestError:
    """The error for an address that does not do, in one line."""
    line = " ".join(why.split())
    return RequestError(f"ray_address {address!r}: {line}", param="ray_address")


def _answer(place: str, token: str | None) -> Any:
    """The gRPC status code with which the cluster at ``place`` answers."""
    import grpc

    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(place) as channel:
        try:
            channel.unary_unary(CALL)(b"", timeout=ANSWER_S, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def _token(address: str) -> str:
    """The one that Ray finds, from now on in use."""
    from ray import _raylet
    from ray._private.authentication import authentication_token_setup as setup

    loader: Any = vars(_raylet)["AuthenticationTokenLoader"].instance()
    if not loader.has_token(ignore_auth_mode=True):
        raise wrong_address(address, f"the cluster asks for a token; {SET}")
    if not setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
        raise wrong_address(address, "the cluster asks for a token; set RAY_AUTH_MODE to token")
    return str(loader.get_raw_token(ignore_auth_mode=True))
