"""Answers from many machines: Ray Data hands batches of asks to actors that hold an LLM each.

Whatever was submitted when replies are read is one dataset, and Ray starts the actors of each
dataset anew. So the model is loaded once for every run of a sweep, and again for each round of a
method that asks further when it has read replies: this is for runs that are long beside that.
"""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from s1engine.config import EngineConfig, check_int
from s1engine.engine.llm import LLM
from s1engine.engine.ray_cluster import check_syntax, connect, resources
from s1engine.eval.backend import EvalRequest, EvalResponse
from s1engine.eval.engine_backend import EngineBackend

MAX_BATCH = 1024  # asks that one actor works on at once


@dataclass(frozen=True, kw_only=True, slots=True)
class RayOptions:
    """Which model, how often, and where."""

    model: str | None = None
    """None: the bundled s1-nano."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Further fields of EngineConfig."""
    replicas: int = 1
    """Actors, each with its own engine."""
    address: str | None = None
    """Of a Ray cluster; None: one is started on this machine."""

    def __post_init__(self) -> None:
        check_int("replicas", self.replicas, 1, 4096)
        check_syntax(self.address)

    @property
    def config(self) -> EngineConfig:
        """Of every engine."""
        named = self.engine if self.model is None else {"model": self.model, **self.engine}
        return EngineConfig(**named)


class Answerer:
    """An actor of Ray Data: pickled asks in, pickled replies out."""

    def __init__(self, model: str | None, engine: dict[str, Any]) -> None:
        self._backend = EngineBackend(LLM(model, progress=False, **engine))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for number, pickled in zip(batch["number"], batch["ask"], strict=True):
            self._backend.submit(replace(pickle.loads(pickled), key=int(number)))
        return {"reply": [pickle.dumps(response) for response in self._backend.responses()]}


class RayBackend:
    """A ``Backend`` on Ray. Close it after use."""

    max_thinking: int | None = None  # known by the actors alone
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
                asks, self._waiting = self._waiting, []
                for row in self._dataset(asks).iter_rows():
                    response: EvalResponse = pickle.loads(row["reply"])
                    self.generated_tokens += sum(
                        sample.output_tokens for sample in response.samples
                    )
                    yield replace(response, request=asks[response.request.key])
        finally:
            self._waiting.clear()

    def _dataset(self, asks: list[EvalRequest]) -> Any:
        from ray import data

        options = self._options
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        batches = max(options.replicas, -(-len(asks) // MAX_BATCH))
        rows = [{"number": i, "ask": pickle.dumps(request)} for i, request in enumerate(asks)]
        blocks = min(batches, len(rows))
        dataset: Any = data.from_items(rows, override_num_blocks=blocks)
        return dataset.map_batches(
            Answerer,
            fn_constructor_kwargs={"model": options.model, "engine": options.engine},
            batch_size=None,  # a block is a batch
            compute=data.ActorPoolStrategy(size=min(options.replicas, blocks)),
            **resources(self._ray, options.address, options.replicas, options.config),
        )

    def close(self) -> None:
        """Leaves the cluster; ends it if it was started here."""
        self._ray.shutdown()
