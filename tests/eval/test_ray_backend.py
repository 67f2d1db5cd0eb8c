"""Ray Data returns the answers of the engine in this process, from any actor."""

from dataclasses import replace

import pytest

from s1engine.config import EngineConfig
from s1engine.engine.llm import LLM
from s1engine.errors import RequestError
from s1engine.eval.backend import Backend, EvalRequest, EvalResponse
from s1engine.eval.engine_backend import EngineBackend
from s1engine.eval.ray_backend import RayBackend, RayOptions
from s1engine.sampling_params import SamplingParams, ThinkingBudget

pytest.importorskip("ray.data", reason="the backend needs Ray: pip install 's1engine[ray]'")

ENGINE = {"dtype": "float32", "kv_cache_memory_gb": 0.1}


def requests() -> list[EvalRequest]:
    """Greedy and seeded, with budgets and traces; the last one is too long."""
    made = [
        EvalRequest(
            key=1000 + i,
            prompt=f"a={i} b=a+{i % 5} b?",
            params=SamplingParams(
                temperature=float(i % 2),
                seed=i,
                n=1 + i % 3,
                max_tokens=80,
                thinking=ThinkingBudget(max_tokens=8 + i),
            ),
            trace=i % 2 == 0,
        )
        for i in range(14)
    ]
    context = LLM(progress=False, **ENGINE).engine.max_model_len
    return [*made, replace(made[0], key=2000, prompt="a" * 10 * context)]


def answered(backend: Backend) -> dict[int, tuple[EvalRequest, object]]:
    """Responses by key, without their times."""
    for request in requests():
        backend.submit(request)
    responses: list[EvalResponse] = list(backend.responses())
    return {r.request.key: (r.request, (r.samples, r.error, r.checkpoints)) for r in responses}


def test_answers_are_those_of_the_engine_in_this_process() -> None:
    want = answered(EngineBackend(LLM(progress=False, **ENGINE)))
    backend = RayBackend(RayOptions(engine=ENGINE, replicas=2))
    try:
        assert answered(backend) == want
        assert backend.generated_tokens > 0 and list(backend.responses()) == []
    finally:
        backend.close()
    assert want[2000][1][1]  # type: ignore[index]
    assert backend.name == EngineConfig().model_name


def test_wrong_options_name_their_field() -> None:
    for wrong, param in (({"replicas": 0}, "replicas"), ({"address": "ray://x:1"}, "ray_address")):
        with pytest.raises(RequestError) as caught:
            RayOptions(**wrong)  # type: ignore[arg-type]
        assert caught.value.param == param
