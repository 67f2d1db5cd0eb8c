"""The Ray cluster that engines are placed on: one that exists, or this machine as a cluster of one.

Checks an address before Ray joins it, because Ray would try for minutes and report neither that
nothing answers nor that a token is missing. A cluster that requires a token gets the one that Ray
finds ($RAY_AUTH_TOKEN, $RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token); Ray itself sends none to an
explicit address. Knows neither servers nor what the engines compute.
"""

import logging
import os
import secrets
from typing import Any

from s1engine.config import EngineConfig
from s1engine.errors import RequestError
from s1engine.extras import require_extra

OBJECT_STORE_BYTES = 80 * 2**20  # hardly used; Ray's minimum is 75 MiB
PROBE_TIMEOUT_S = 5.0
# A call that any cluster answers before it is joined; its empty request has no bytes.
PROBE_CALL = "/ray.rpc.NodeInfoGcsService/GetClusterId"
SET_TOKEN = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or write it to ~/.ray/auth_token"


def connect(address: str | None, engines: int) -> Any:
    """Joins the cluster at ``address`` and returns the module ``ray``.

    None starts a cluster on this machine with room for ``engines``; it ends with this process.
    Raises RequestError if Ray is missing, or if no cluster accepts this process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        _restrict_to_this_machine()
    require_extra("ray", param="replicas")
    import ray

    if address is None:
        ray.init(
            num_cpus=max(os.cpu_count() or 1, engines),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
    else:
        check_cluster(address)
        try:
            ray.init(address=address, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise _address_error(address, str(error)) from error
    return ray


def _restrict_to_this_machine() -> None:
    """Call before Ray is imported. Of a local cluster's ports, Ray then opens only one per Serve
    replica on all interfaces, and that one accepts only holders of the token."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # keeps 127.0.0.1 as it is
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:  # else Ray writes a token file and leaves it there
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def resources(ray: Any, address: str | None, engines: int, config: EngineConfig) -> dict[str, int]:
    """Resources of one engine: its GPUs, or its share of this machine's cores (Ray limits its
    threads to them)."""
    if config.device == "cuda" or (config.device == "auto" and ray.cluster_resources().get("GPU")):
        return {"num_cpus": 1, "num_gpus": getattr(config, "tensor_parallel_size", 1)}
    if address is not None:
        return {"num_cpus": 1}
    return {"num_cpus": max((os.cpu_count() or 1) // engines, 1)}


# --- addresses ---


def check_syntax(address: str | None) -> None:
    """Raises RequestError for an address that cannot work. Does not need Ray."""
    if address is not None and address.startswith("ray://"):
        raise _address_error(
            address, "Ray's client protocol cannot stream; give host:port of the cluster, or auto"
        )


def check_cluster(address: str) -> None:
    """Raises RequestError unless a cluster answers at ``address`` and accepts this process's token,
    if it requires one; afterwards this process uses that token."""
    import grpc
    from ray._private import services

    try:
        endpoint = services.canonicalize_bootstrap_address_or_die(address)
        services.extract_ip_port(endpoint)
    except (ConnectionError, ValueError) as error:
        raise _address_error(address, str(error)) from error
    if uses_tls():
        return  # Ray's own certificates decide
    code = _probe(endpoint, None)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        code = _probe(endpoint, _enable_token(address))
        if code is grpc.StatusCode.UNAUTHENTICATED:
            raise _address_error(address, f"the cluster does not accept this token; {SET_TOKEN}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        raise _address_error(address, "what answers there is no Ray cluster")
    if code is not grpc.StatusCode.OK:
        raise _address_error(address, f"no Ray cluster answers there ({code.name.lower()})")


def uses_tls() -> bool:
    """True if Ray encrypts and shows certificates, by Ray's own reading of its variable."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _address_error(address: str, reason: str) -> RequestError:
    line = " ".join(reason.split())
    return RequestError(f"ray_address {address!r}: {line}", param="ray_address")


def _probe(endpoint: str, token: str | None) -> Any:
    """The gRPC status code with which the cluster at ``endpoint`` answers."""
    import grpc

    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(endpoint) as channel:
        try:
            channel.unary_unary(PROBE_CALL)(b"", timeout=PROBE_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def _enable_token(address: str) -> str:
    """Makes this process use the token that Ray finds, and returns it."""
    from ray import _raylet
    from ray._private.authentication import authentication_token_setup as setup

    loader: Any = vars(_raylet)["AuthenticationTokenLoader"].instance()
    if not loader.has_token(ignore_auth_mode=True):
        raise _address_error(address, f"the cluster asks for a token; {SET_TOKEN}")
    if not setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
        raise _address_error(address, "the cluster asks for a token; set RAY_AUTH_MODE to token")
    return str(loader.get_raw_token(ignore_auth_mode=True))
