"""The replicas as a deployment of Ray Serve: how many, on which resources, scaled by which figures.

Does not know how requests reach them.
"""

import warnings
from dataclasses import dataclass
from typing import Any

from s1engine.checks import check_int
from s1engine.engine.ray_cluster import check_syntax
from s1engine.errors import RequestError
from s1engine.server.router.replica import Replica, ReplicaOptions

STARTS = 2  # tries of a replica to load the model
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 30.0
DRAIN_S = 3600.0  # for a replica that is scaled away to finish its requests
# Ray's own delays are 10, 30 and 30 s: a queue would have to last for most of a minute.
METRICS_S = 1.0  # between two reports of a replica on its load
LOOK_BACK_S = 4.0  # over which reports are averaged
UPSCALE_S = 2.0  # that more replicas must be wanted without a break
DOWNSCALE_S = 300.0  # the same for fewer: loading a model again costs more than keeping it
NAME = "Replica"
QUIET: dict[str, Any] = {"log_level": "WARNING", "enable_access_log": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaPoolOptions:
    """How many replicas, and where."""

    min_replicas: int = 1
    max_replicas: int = 1
    """Above ``min_replicas``, their number follows the requests in flight."""
    target: int | None = None
    """Requests in flight for each replica; None: as many as one runs at once."""
    address: str | None = None
    """Of a running Ray cluster; None: one is started here, and ended with the pool."""

    def __post_init__(self) -> None:
        check_int("min_replicas", self.min_replicas, 1, 4096)
        check_int("max_replicas", self.max_replicas, 1, 4096)
        if self.max_replicas < self.min_replicas:
            raise RequestError("max_replicas is below min_replicas", param="max_replicas")
        if self.target is not None:
            check_int("target_ongoing_requests", self.target, 1, 2**20)
        check_syntax(self.address)


def create_deployment(
    options: ReplicaPoolOptions, replica: ReplicaOptions, resources: dict[str, int]
) -> Any:
    """Return Ray Serve's deployment; ``resources`` are those of one replica."""
    from ray import serve

    scale: dict[str, Any] = {"num_replicas": options.min_replicas}
    if options.max_replicas > options.min_replicas:
        scale = {"autoscaling_config": autoscaling_config(options, replica.config.max_num_seqs)}
    return serve.deployment(
        Replica,
        name=NAME,
        ray_actor_options=resources,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=DRAIN_S,
        logging_config=QUIET,
        max_constructor_retry_count=STARTS,
        **scale,
    )


def autoscaling_config(options: ReplicaPoolOptions, target: int) -> Any:
    """Return Ray's configuration of ``autoscaling``; ``target`` is the default one."""
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    policy: Any = AutoscalingPolicy
    with warnings.catch_warnings():
        # Ray does not read the variables that replace this field for handles yet.
        warnings.filterwarnings("ignore", "The `metrics_interval_s` field", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.target or target,
            metrics_interval_s=METRICS_S,
            look_back_period_s=LOOK_BACK_S,
            upscale_delay_s=UPSCALE_S,
            downscale_delay_s=DOWNSCALE_S,
            policy=policy(policy_function="s1engine.server.router.autoscaling:scale_by_queue"),
        )
