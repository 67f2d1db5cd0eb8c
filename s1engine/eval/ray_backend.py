"""Answers from many machines: Ray Data sends batches of requests to actors with an LLM each.

All requests submitted before responses are read form one dataset, and Ray starts new actors for
each dataset. So the model is loaded once for each run of a sweep, and again for each round of a
method that asks further. Use this for runs that are long compared with loading.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from s1engine.checks import check_int
from s1engine.config import EngineConfig
from s1engine.engine.llm import LLM
from s1engine.engine.ray_cluster import check_syntax, connect, resources
from s1engine.eval.backend import EvalRequest, EvalResponse
from s1engine.eval.engine_backend import EngineBackend

MAX_BATCH = 1024  # requests that an actor runs at once


@dataclass(frozen=True, kw_only=True, slots=True)
class RayOptions:
    """Model, number of engines, and cluster."""

    model: str | None = None
    """None: the bundled s1-nano."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Other fields of EngineConfig."""
    replicas: int = 1
    """Actors, each with its own engine."""
    address: str | None = None
    """Address of a Ray cluster; None: start one on this machine."""

    def __post_init__(self) -> None:
        check_int("replicas", self.replicas, 1, 4096)
        check_syntax(self.address)

    @property
    def config(self) -> EngineConfig:
        """The config of every engine."""
        fields = self.engine if self.model is None else {"model": self.model, **self.engine}
        return EngineConfig(**fields)


class EngineActor:
    """An actor of Ray Data: a column of requests in, a column of responses out."""

    def __init__(self, model: str | None, engine: dict[str, Any]) -> None:
        self._backend = EngineBackend(LLM(model, progress=False, **engine))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for request in batch["request"]:
            self._backend.submit(request)
        responses = list(self._backend.responses())
        column = np.empty(len(responses), object)
        column[:] = responses
        return {"response": column}


class RayBackend:
    """A ``Backend`` on Ray. Close it after use."""

    max_thinking: int | None = None  # only the actors know it
    can_think = True

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        self.name = options.config.model_name
        self.generated_tokens = 0
        self._ray = connect(options.address, options.replicas)
        self._waiting: list[EvalRequest] = []

    def submit(self, request: EvalRequest) -> None:
        self._waiting.append(request)

    def responses(self) -> Iterator[EvalResponse]:
        try:
            while self._waiting:
                requests, self._waiting = self._waiting, []
                for row in self._dataset(requests).iter_rows():
                    response: EvalResponse = row["response"]
                    self.generated_tokens += sum(s.output_tokens for s in response.samples)
                    yield replace(response, request=requests[response.request.key])
        finally:
            self._waiting.clear()

    def _dataset(self, requests: Sequence[EvalRequest]) -> Any:
        """Responses to the requests, whose keys are their indices in ``requests``."""
        from ray import data

        options = self._options
        data.DataContext.get_current().enable_progress_bars = False
        rows = [{"request": replace(request, key=i)} for i, request in enumerate(requests)]
        blocks = min(max(options.replicas, -(-len(rows) // MAX_BATCH)), len(rows))
        dataset: Any = data.from_items(rows, override_num_blocks=blocks)
        return dataset.map_batches(
            EngineActor,
            fn_constructor_kwargs={"model": options.model, "engine": options.engine},
            batch_size=None,  # a block is a batch
            compute=data.ActorPoolStrategy(size=min(options.replicas, blocks)),
            **resources(self._ray, options.address, options.replicas, options.config),
        )

    def close(self) -> None:
        """Leaves the cluster; stops it if it was started here."""
        self._ray.shutdown()
