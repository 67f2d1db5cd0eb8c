"""The simulation against arithmetic, against itself and against the engine."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.bench.shapes import shape
from s1engine.config import EngineConfig
from s1engine.engine.llm import LLM
from s1engine.outputs import RequestOutput
from s1engine.plan import simulated_replica, workload
from s1engine.plan.hardware import GPUS
from s1engine.plan.options import ROUTINGS
from s1engine.plan.placement import place_on_gpus
from s1engine.plan.roofline import roofline
from s1engine.plan.simulation import Simulation, simulate
from s1engine.plan.step_time import GpuTimeModel, StepShape
from s1engine.plan.workload import PlannedBudget, PlannedRequest
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from tests.plan.machines import LinearTimeModel, budgets, placed, request_lists

NO_BUDGET = PlannedBudget()


def test_two_requests_by_hand() -> None:
    """A step takes 1 s and 0.1 s a token. The second request arrives during the first prefill."""
    found = simulate(
        [PlannedRequest(0, 8, 3), PlannedRequest(0.5, 16, 2)],
        placed(),
        LinearTimeModel(context=0.0),
        budget=NO_BUDGET,
    )
    first, second = found.served
    # 8 tokens: to 1.8. Then one token and 15 of the prompt: to 4.4. Then one and one: to 5.6.
    assert (first.first, first.end) == pytest.approx((1.8, 5.6))
    assert (second.first, second.end) == pytest.approx((5.6, 6.7))
    assert found.summary()["busy"] == pytest.approx(1.0)


@given(st.integers(1, 4), st.integers(1, 30))
def test_requests_wait_for_the_end_of_a_multi_step_decode(run_ahead: int, step: int) -> None:
    """A request decodes in steps of 1 s; another one arrives between two steps."""
    at = 1.0 + step + 0.5
    found = simulate(
        [PlannedRequest(0, 8, 60), PlannedRequest(at, 8, 1)], placed(run_ahead=run_ahead),
        LinearTimeModel(1, 0, 0),
        budget=NO_BUDGET,
    )  # fmt: skip
    decode_end = 1 + run_ahead * -(-(step + 1) // run_ahead)
    assert found.served[1].first == decode_end + 1


@given(
    request_lists(), budgets, st.integers(1, 3), st.sampled_from(ROUTINGS), st.integers(1, 9),
    st.integers(16, 40), st.sampled_from([1, 8]), st.booleans(),
)  # fmt: skip
def test_every_request_finishes_and_every_token_counts(
    requests: list[PlannedRequest],
    budget: PlannedBudget,
    replicas: int,
    routing: str,
    max_num_seqs: int,
    num_blocks: int,
    run_ahead: int,
    caching: bool,
) -> None:
    longest = max(workload.max_len(request, budget) for request in requests)
    place = placed(
        num_blocks=max(num_blocks, -(-longest // 4)), max_num_seqs=max_num_seqs,
        enable_prefix_caching=caching, run_ahead=run_ahead,
    )  # fmt: skip
    found = simulate(
        requests, place, LinearTimeModel(), budget=budget, replicas=replicas, routing=routing
    )
    assert [one.number for one in found.served] == list(range(len(requests)))
    for one, request in zip(found.served, requests, strict=True):
        assert one.request is request and request.at < one.first <= one.end
        assert one.output_tokens == workload.output_len(request, budget)
        thinking = 0 if request.thinking is None else workload.thinking_len(request, budget)[0]
        assert one.thinking_tokens == thinking
    for engine in found.replicas:
        engine.check_integrity()
        assert engine.outstanding == 0
    figures = found.summary()
    assert 0 < figures["busy"] <= 1 + 1e-9
    assert figures["output_tokens"] == sum(one.output_tokens for one in found.served)


class UncachedReplica(simulated_replica.SimulatedReplica):
    """Reads every batch, even if the schedule is unchanged."""

    def _begin_step(self, now: float) -> None:
        self._quiet_steps = 0
        super()._begin_step(now)


@given(request_lists(), budgets, st.integers(20, 40))
def test_quiet_steps_equal_steps_that_read_the_batch(
    requests: list[PlannedRequest], budget: PlannedBudget, num_blocks: int
) -> None:
    longest = max(workload.max_len(request, budget) for request in requests)
    place = placed(num_blocks=max(num_blocks, -(-longest // 4)))
    usual = simulate(requests, place, LinearTimeModel(), budget=budget)
    uncached = UncachedReplica(place, LinearTimeModel(), budget)
    for number, request in enumerate(requests):
        uncached.advance(request.at)
        uncached.submit(number, request)
    uncached.advance(float("inf"))
    again = sorted(uncached.finished, key=lambda one: one.number)
    assert [(one.first, one.end) for one in usual.served] == [(o.first, o.end) for o in again]


@given(request_lists(thinking=False), st.integers(1, 4), st.booleans())
def test_twice_the_gpus_are_not_slower(
    requests: list[PlannedRequest], replicas: int, at_once: bool
) -> None:
    """Requests that arrive at once are finished as early. Requests that arrive over time may miss a
    step with other requests, which costs at most one step."""
    if at_once:
        requests = [replace(request, at=0.0) for request in requests]
    slack = (
        0.0 if at_once else LinearTimeModel().seconds(StepShape(16, 8, 8 * 60))
    )  # the longest step

    def done(replicas: int) -> float:
        found = simulate(
            requests, placed(), LinearTimeModel(), budget=NO_BUDGET, replicas=replicas,
            routing="round-robin",
        )  # fmt: skip
        return max(one.end for one in found.served)

    assert done(2 * replicas) <= done(replicas) + slack + 1e-9


@given(request_lists(most=1), st.integers(0, 40), st.integers(0, 40), st.integers(0, 2))
def test_a_larger_budget_is_never_faster(
    requests: list[PlannedRequest], budget: int, more: int, waits: int
) -> None:
    ends = []
    for limit in (budget, budget + more):
        bound = PlannedBudget(max_thinking=limit, num_waits=waits, newline_len=0, forced_end_len=2)
        ends.append(simulate(requests, placed(), LinearTimeModel(), budget=bound).served[0].end)
    assert ends[0] <= ends[1]


@settings(max_examples=30)
@given(
    st.sampled_from(["0.5B", "7B", "14B"]),
    st.sampled_from(sorted(GPUS)),
    st.sampled_from([1, 2]),
    st.integers(1, 5000),
    st.integers(1, 300),
)
def test_one_request_meets_the_roofline(
    name: str, gpu: str, ranks: int, prompt: int, answer: int
) -> None:
    model = shape(name)
    config = EngineConfig(tensor_parallel_size=ranks)
    place = place_on_gpus(config, model, model.torch_dtype, GPUS[gpu], weights="int8")
    time, requests = GpuTimeModel(GPUS[gpu], place.footprint), [PlannedRequest(0.0, prompt, answer)]
    bound = roofline(requests, place, time, budget=NO_BUDGET)
    found = simulate(requests, place, time, budget=NO_BUDGET).summary()
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        assert found[name] == pytest.approx(bound[name], rel=1e-9)
    assert found["tokens_per_s"] == pytest.approx(bound["tokens_per_s"], rel=1e-9)


def test_load_is_near_the_roofline() -> None:
    model = shape("7B")
    place = place_on_gpus(EngineConfig(), model, model.torch_dtype, GPUS["H100"], weights="auto")
    time = GpuTimeModel(GPUS["H100"], place.footprint)
    requests = workload.pace_requests(
        workload.plan_requests(workload.random_arrivals(300, 256, 256, 0.2, seed=0), 0.0),
        20,
        seed=0,
    )
    bound = roofline(requests, place, time, budget=NO_BUDGET)
    found = simulate(requests, place, time, budget=NO_BUDGET).summary()
    for name in ("tokens_per_s", "requests_per_s"):
        assert found[name] == pytest.approx(bound[name], rel=0.05)
    assert found["tpot_s"]["mean"] == pytest.approx(bound["tpot_s"]["mean"], rel=0.15)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(progress=False, dtype="float32", max_num_seqs=3, enable_prefix_caching=False,
               max_num_batched_tokens=24)  # fmt: skip


def replayed(llm: LLM, outputs: list[RequestOutput], bounds: ThinkingBudget) -> Simulation:
    """A simulation whose scripts are the model's outputs."""
    fmt, engine = llm.engine.format, llm.engine
    assert fmt is not None
    budget = PlannedBudget(
        max_thinking=bounds.max_tokens,
        num_waits=bounds.num_waits,
        start_len=len(fmt.start),
        natural_end_len=len(fmt.natural_end),
        newline_len=len(fmt.newline),
        forced_end_len=len(fmt.forced_end()),
        wait_len=len(engine.tokenizer.encode(bounds.wait_text)),
    )
    scripts = []
    for output in outputs:
        sample = output.outputs[0]
        assert sample.thinking is not None
        cut = sample.thinking.end_reason == "budget"
        end = budget.newline_len + budget.forced_end_len if cut else budget.natural_end_len
        thought, waits = sample.thinking.tokens, bounds.num_waits
        answer = len(sample.token_ids) - thought - end
        wanted = thought + cut
        if waits:  # where the wait begins is where the model first tried to end
            wanted = sample.forced.index(True)
            budget = replace(budget, wait_thinking=thought - wanted - budget.wait_len)
        prompt = len(output.prompt_token_ids) - budget.start_len
        scripts.append(PlannedRequest(0.0, prompt, answer, wanted))
    config = engine.config
    place = placed(
        num_blocks=engine.runner.num_blocks,
        block_size=config.block_size,
        max_model_len=engine.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    return simulate(scripts, place, LinearTimeModel(), budget=budget)


@pytest.mark.parametrize(("count", "limit", "waits"), [(7, 12, 0), (5, 40, 0), (1, None, 1)])
def test_tokens_and_steps_are_those_of_the_engine(
    llm: LLM, count: int, limit: int | None, waits: int
) -> None:
    bounds = ThinkingBudget(max_tokens=limit, num_waits=waits)
    params = SamplingParams(temperature=0, thinking=bounds, max_tokens=200)
    before = llm.engine.scheduler.stats()
    chats = [[{"role": "user", "content": f"a={i} b=a+4 c=b*{i} c?"}] for i in range(2, 2 + count)]
    outputs = llm.chat(chats, params, progress=False)
    after = llm.engine.scheduler.stats()
    found = replayed(llm, outputs, bounds)
    for one, output in zip(found.served, outputs, strict=True):
        sample = output.outputs[0]
        assert sample.thinking is not None
        assert one.output_tokens == len(sample.token_ids)
        assert one.thinking_tokens == sample.thinking.tokens
        assert one.forced_tokens == sum(sample.forced)
    (engine,) = found.replicas
    stats = engine.stats()
    for name in ("num_steps", "num_computed_tokens", "num_sampled_tokens"):
        assert getattr(stats, name) == getattr(after, name) - getattr(before, name), name


def test_step_counts_pairs() -> None:
    """A prompt of five tokens in chunks of two sees 1 + 2 + ... + 5 pairs."""
    seen: list[StepShape] = []

    class Watching(LinearTimeModel):
        def seconds(self, step: StepShape) -> float:
            seen.append(step)
            return 1.0

    place = placed(max_num_batched_tokens=2, max_num_seqs=2)
    simulate([PlannedRequest(0, 5, 2)], place, Watching(), budget=NO_BUDGET)
    assert seen == [
        StepShape(2, 0, 0, 2, 3, 1), StepShape(2, 0, 0, 4, 7, 0), StepShape(1, 1, 5, 0, 0, 0),
        StepShape(1, 1, 6),
    ]  # fmt: skip
