"""Where engines run that Ray places: a cluster that is there, or this machine as one.

Knows neither servers nor what the engines are asked.
"""

import logging
import os
from typing import Any

from s1engine.config import EngineConfig
from s1engine.errors import RequestError

OBJECT_STORE_BYTES = 80 * 2**20  # little goes through it; Ray's least is 75 MiB


def check_address(address: str | None) -> None:
    """Raises RequestError for an address that cannot do."""
    if address is not None and address.startswith("ray://"):
        raise RequestError(
            "ray_address: Ray's client protocol (ray://) cannot stream; "
            "give host:port of the cluster, or auto",
            param="ray_address",
        )


def connect(address: str | None, engines: int) -> Any:
    """The module ``ray``, joined to the cluster; None: one of this machine is started, with room
    for so many engines, and ends with this process. Raises RequestError if Ray is missing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise RequestError(
            "Ray is missing: pip install 's1engine[ray]'", param="replicas"
        ) from error
    if address is not None:
        try:
            ray.init(address=address, logging_level=logging.WARNING)
        except (ConnectionError, ValueError) as error:
            raise RequestError(f"ray_address {address}: {error}", param="ray_address") from error
        return ray
    ray.init(
        num_cpus=max(os.cpu_count() or 1, engines),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.WARNING,
        _node_ip_address="127.0.0.1",
    )
    return ray


def resources(ray: Any, address: str | None, engines: int, config: EngineConfig) -> dict[str, int]:
    """Of one engine: its GPUs, or its share of this machine's cores (Ray limits its threads to
    them)."""
    if config.device == "cuda" or (config.device == "auto" and ray.cluster_resources().get("GPU")):
        return {"num_cpus": 1, "num_gpus": getattr(config, "tensor_parallel_size", 1)}
    if address is not None:
        return {"num_cpus": 1}
    return {"num_cpus": max((os.cpu_count() or 1) // engines, 1)}
