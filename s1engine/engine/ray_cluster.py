"""Where engines run that Ray places: a cluster that is there, or this machine as one.

Knows neither servers nor what the engines are asked.
"""

import logging
import os
import secrets
from typing import Any

from s1engine.config import EngineConfig
from s1engine.engine.ray_address import check_cluster, wrong_address
from s1engine.errors import RequestError

OBJECT_STORE_BYTES = 80 * 2**20  # little goes through it; Ray's least is 75 MiB


def connect(address: str | None, engines: int) -> Any:
    """The module ``ray``, joined to the cluster; None: one of this machine is started, with room
    for so many engines, and ends with this process. Raises RequestError if Ray is missing, or if
    there is no cluster that lets us in."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        _keep_to_this_machine()
    try:
        import ray
    except ImportError as error:
        raise RequestError(
            "Ray is missing: pip install 's1engine[ray]'", param="replicas"
        ) from error
    if address is None:
        _start(ray, engines)
    else:
        check_cluster(address)
        try:
            ray.init(address=address, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise wrong_address(address, str(error)) from error
    return ray


def _keep_to_this_machine() -> None:
    """Of the ports that a cluster started here opens, Ray then leaves one for each Serve replica on
    all interfaces, and that one answers only those who have the token. Before Ray is imported."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # 127.0.0.1 stays what it is
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:  # else Ray writes one to a file, for good
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _start(ray: Any, engines: int) -> None:
    ray.init(
        num_cpus=max(os.cpu_count() or 1, engines),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )


def resources(ray: Any, address: str | None, engines: int, config: EngineConfig) -> dict[str, int]:
    """Of one engine: its GPUs, or its share of this machine's cores (Ray limits its threads to
    them)."""
    if config.device == "cuda" or (config.device == "auto" and ray.cluster_resources().get("GPU")):
        return {"num_cpus": 1, "num_gpus": getattr(config, "tensor_parallel_size", 1)}
    if address is not None:
        return {"num_cpus": 1}
    return {"num_cpus": max((os.cpu_count() or 1) // engines, 1)}
