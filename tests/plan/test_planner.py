"""Plans of known models on known GPUs; options, traces, the command."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s1engine import cli
from s1engine.bench.shapes import shape
from s1engine.config import EngineConfig
from s1engine.errors import RequestError
from s1engine.models.fp8_layout import Fp8Layout
from s1engine.models.weight_bytes import weight_bytes
from s1engine.plan import options as plan_options
from s1engine.plan.hardware import GPUS
from s1engine.plan.options import PlanOptions
from s1engine.plan.placement import Placement, place_on_gpus
from s1engine.plan.planner import build_plan
from s1engine.plan.simulation import ROUTINGS, simulate
from s1engine.plan.step_time import (
    GpuTimeModel,
    SpeculativeTimeModel,
    StepShape,
    decode_step,
    draft_choices,
)
from s1engine.plan.workload import (
    Arrival,
    PlannedBudget,
    PlannedRequest,
    pace_requests,
    plan_requests,
    read_trace,
)
from tests.plan.machines import LinearTimeModel, placed
from tests.shared_data import shared_file

ENGINE_FIELDS = ("tensor_parallel_size", "num_speculative_tokens")


def on(gpu: str, name: str, ranks: int = 1, weights: str = "auto", kv: str = "auto") -> Placement:
    model = shape(name)
    config = EngineConfig(kv_cache_dtype=kv, tensor_parallel_size=ranks)
    return place_on_gpus(config, model, model.torch_dtype, GPUS[gpu], weights=weights)


def test_the_memory_of_seven_billion_weights() -> None:
    place = on("H100", "7B")
    foot = place.footprint
    assert foot.weight_bytes == 2 * shape("7B").num_parameters
    assert foot.kv_bytes_per_token == 57_344
    free = 0.9 * 80e9 - foot.weight_bytes - foot.activation_bytes
    assert place.kv_cache_tokens == free // (64 * 57_344) * 64
    assert place.largest_batch(32_768) == place.kv_cache_tokens // 32_768
    assert place.largest_batch(1) == 256


def test_weight_formats_save_memory() -> None:
    model, plain = shape("32B"), on("H200", "32B").footprint
    for weights in ("int8", "int4", "fp8"):
        foot = on("H200", "32B", weights=weights).footprint
        wanted = weight_bytes(model, model.torch_dtype, weights).total  # as the engine counts
        assert foot.weight_bytes == pytest.approx(wanted, rel=1e-6)
    fp8 = on("H200", "32B", weights="fp8").footprint
    assert plain.layer_bytes == pytest.approx(2 * fp8.layer_bytes, rel=1e-3)
    assert plain.head_bytes == fp8.head_bytes
    cached = on("H200", "32B", kv="fp8").footprint.kv_bytes_per_token
    assert cached == shape("32B").kv_bytes_per_token(torch.float8_e4m3fn) < plain.kv_bytes_per_token
    with pytest.raises(RequestError, match="int8 is not covered on GPUs"):
        on("H200", "32B", kv="int8")
    two = on("H200", "32B", ranks=2).footprint
    assert two.weight_bytes == plain.weight_bytes + plain.rest_bytes  # each rank has the embedding


@pytest.mark.parametrize(("name", "rate"), [("0.5B", 2240), ("7B", 253), ("32B", 58)])
def test_one_sequence_is_as_fast_as_predicted_by_hand(name: str, rate: float) -> None:
    """bench/results/gpu_predictions.md."""
    time = GpuTimeModel(GPUS["H200"], on("H200", name).footprint)
    assert 1 / time.seconds(decode_step(1, 0)) == pytest.approx(rate, rel=0.02)


def test_ranks_share_the_work_but_not_the_gaps() -> None:
    alone = GpuTimeModel(GPUS["H200"], on("H200", "32B").footprint).seconds(decode_step(8, 1000))
    two = GpuTimeModel(GPUS["H200"], on("H200", "32B", ranks=2).footprint).seconds(
        decode_step(8, 1000)
    )
    eight = GpuTimeModel(GPUS["H200"], on("H200", "32B", ranks=8).footprint).seconds(
        decode_step(8, 1000)
    )
    assert alone / 2 < two < alone and alone / 8 < eight < two


def planned(options: dict[str, Any], **engine: Any) -> dict[str, Any]:
    usual = {"requests": 20, "output_len": 200, "gpus": "2"}
    return build_plan(EngineConfig(**engine), shape("32B"), PlanOptions(**(usual | options)))


def rate(plan: dict[str, Any]) -> float:
    return float(plan["cases"][0]["simulated"]["tokens_per_s"])


def test_two_gpus_of_one_engine_are_planned_and_their_link_counts() -> None:
    plan = planned({}, tensor_parallel_size=2)
    assert plan["engine"]["tensor_parallel_size"] == 2 and plan["cases"][0]["replicas"] == 1
    slower = [{"link_us": 80.0}, {"link_gb_per_s": 4.0}]
    assert all(rate(planned(link, tensor_parallel_size=2)) < 0.95 * rate(plan) for link in slower)
    assert any("450 GB/s" in line for line in plan["assumptions"])


def test_drafts_are_planned_as_measured_or_as_accepted() -> None:
    plain = rate(planned({}, tensor_parallel_size=2))
    none = rate(planned({"acceptance": "0"}, tensor_parallel_size=2, num_speculative_tokens=4))
    traces = rate(planned({}, tensor_parallel_size=2, num_speculative_tokens=4))
    sure = rate(planned({"acceptance": "1"}, tensor_parallel_size=2, num_speculative_tokens=4))
    assert none == pytest.approx(plain) and 1.1 * plain < traces < 1.7 * plain < sure < 5 * plain


@given(
    st.integers(1, 16),
    st.none() | st.floats(0, 1),
    st.floats(1, 256),
    st.floats(0, 30_000),
    st.sampled_from(["A100", "L4", "H200"]),
)
def test_drafts_never_cost_time_and_bolder_ones_emit_more(
    most: int, acceptance: float | None, rows: float, context: float, gpu: str
) -> None:
    plain = GpuTimeModel(GPUS[gpu], placed().footprint)
    found = draft_choices(most, acceptance)
    time = SpeculativeTimeModel(plain, found)
    step = decode_step(rows, context)
    assert time.seconds(step) <= plain.seconds(step)
    for drafted, kept in found:
        assert 0 < drafted <= most and 1 <= kept <= 1 + drafted
    assert sorted(found) == list(found) == sorted(found, key=lambda pair: pair[1])
    prompt = StepShape(100, 1, 0, 100, 5050)
    assert time.seconds(prompt) == plain.seconds(prompt)


@pytest.mark.parametrize(
    ("gpu", "weights", "ways"),
    [
        ("L40S", "auto", ["2 GPUs (--tensor-parallel-size 2)", "--weights fp8", "--weights int4"]),
        ("L4", "auto", ["4 GPUs (--tensor-parallel-size 4)", "on 1 GPU: A100, H100"]),
        ("L4", "fp8", ["2 GPUs (--tensor-parallel-size 2)", "on 1 GPU: A100"]),
    ],
)
def test_an_error_of_memory_names_what_would_fit(gpu: str, weights: str, ways: list[str]) -> None:
    with pytest.raises(RequestError) as error:
        on(gpu, "32B", weights=weights)
    assert error.value.param == "gpu"
    assert all(way in str(error.value) for way in ways)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"gpu": "H1000"}, "gpu"),
        ({"gpu": "cpu"}, "gpu"),
        ({"gpu": "cpu", "calibrate": True, "weights": "int8"}, "gpu"),
        ({"calibrate": True}, "calibrate"),
        ({"gpus": "0"}, "gpus"),
        ({"gpus": "65"}, "gpus"),
        ({"gpus": "3", "tensor_parallel_size": 2}, "gpus"),
        ({"tensor_parallel_size": 3, "gpus": "3"}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 9, "gpus": "9"}, "tensor_parallel_size"),
        ({"gpu": "cpu", "calibrate": True, "tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"gpu": "cpu", "calibrate": True, "num_speculative_tokens": 2}, "num_speculative_tokens"),
        ({"link_us": -1.0}, "link_us"),
        ({"link_gb_per_s": 0.0}, "link_gb_per_s"),
        ({"acceptance": "1.5"}, "acceptance"),
        ({"acceptance": "often"}, "acceptance"),
        ({"acceptance": "nan"}, "acceptance"),
        ({"routing": "random"}, "routing"),
        ({"weights": "int2"}, "weights"),
        ({"trace": "/no/such/file"}, None),
        ({"requests": 0}, "requests"),
        ({"rate": "1,x"}, "rate"),
        ({"rate": "nan"}, "rate"),
        ({"rate": "0"}, "rate"),
        ({"input_len": 40_000, "spread": 0.0}, "input_len"),
        ({"spread": 2.0}, "spread"),
        ({"thinking_share": -1.0}, "thinking_share"),
        ({"thinking_budget": "5"}, "thinking_share"),
        ({"thinking_budget": "5,many", "thinking_share": 0.5}, "thinking_budget"),
        ({"num_waits": 65, "thinking_share": 0.5}, "num_waits"),
        ({"wait_thinking": 0}, "wait_thinking"),
    ],
)
def test_a_mistake_names_its_field(given: dict[str, Any], param: str | None) -> None:
    given = dict(given)
    error: type[Exception] = RequestError if param else OSError
    with pytest.raises(error) as found:
        engine = {name: given.pop(name) for name in ENGINE_FIELDS if name in given}
        options = PlanOptions(**({"requests": 2, "gpus": "2,4"} | given))
        build_plan(EngineConfig(**engine), shape("7B"), options)
    assert getattr(found.value, "param", None) == param


def test_the_engines_own_quantization_counts() -> None:
    config = EngineConfig(quantization="int8")
    options: dict[str, Any] = {"requests": 2, "output_len": 8, "gpus": "1"}
    plan = build_plan(config, shape("7B"), PlanOptions(**options))
    same = build_plan(EngineConfig(), shape("7B"), PlanOptions(weights="int8", **options))
    assert plan == same and plan["engine"]["weights"] == "int8"
    with pytest.raises(RequestError, match="both given"):
        build_plan(config, shape("7B"), PlanOptions(weights="fp8", **options))


def test_a_checkpoint_in_fp8_is_planned_in_fp8() -> None:
    options = PlanOptions(requests=2, output_len=8, gpus="1")
    stored = replace(shape("7B"), fp8=Fp8Layout("weight_scale", "row"))
    assert build_plan(EngineConfig(), stored, options)["engine"]["weights"] == "fp8"


def test_routings_have_the_names_that_options_know() -> None:
    assert set(ROUTINGS) == set(plan_options.ROUTINGS)


def test_every_combination_is_planned_and_more_load_takes_longer() -> None:
    options = PlanOptions(
        gpus="1,2", rate="1,inf", thinking_budget="none,64", thinking_share=0.8, requests=40,
        output_len=400, num_waits=1, wait_thinking=50,
    )  # fmt: skip
    plan = build_plan(EngineConfig(), shape("7B"), options)
    cases = {
        (case["gpus"], case["requests_per_s"], case["thinking_budget"]): case["simulated"]
        for case in plan["cases"]
    }
    assert len(cases) == len(plan["cases"]) == 8
    for gpus, rate, budget in cases:
        mean = cases[gpus, rate, budget]["e2e_s"]["mean"]
        assert mean <= cases[gpus, None, budget]["e2e_s"]["mean"]  # all at once
        assert mean >= cases[gpus, rate, 64]["e2e_s"]["mean"]
    assert cases[2, None, 64]["tokens_per_s"] > cases[1, None, 64]["tokens_per_s"]


@pytest.mark.parametrize(
    ("file", "timed"),
    [
        ("azure2023_conv.part1.csv", True),
        ("azure2023_code.part1.csv", True),
        ("mooncake_conversation.part1.jsonl", True),
        ("sharegpt_qwen3_lengths.jsonl", True),
        ("arxiv_summarization_lengths.csv", False),
    ],
)
def test_traces_are_read(file: str, timed: bool) -> None:
    path = shared_file(f"serving/{file}")
    found = read_trace(path)
    assert len(found) == len(path.read_text().splitlines()) - (path.suffix == ".csv")
    assert all((one.at is not None) == timed for one in found)
    request_lists = plan_requests(found, 0.0)
    assert sum(a.prompt_len for a in request_lists) == sum(one.input_len for one in found)
    assert all(a.at <= b.at for a, b in pairwise(request_lists))
    faster = pace_requests(request_lists, 50.0, seed=0)
    assert len(request_lists) / faster[-1].at == pytest.approx(50.0, rel=0.1)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(RequestError, match="has no line of a known form"):
        read_trace(file)
    file.write_text("")
    with pytest.raises(RequestError, match="is empty"):
        build_plan(EngineConfig(), shape("7B"), PlanOptions(trace=str(file)))


def test_shared_blocks_are_computed_once() -> None:
    """The first 512 tokens of both prompts are equal."""
    arrivals = [Arrival(0, 600, 5, (1, 2)), Arrival(9, 600, 5, (1, 3)), Arrival(9, 600, 5, (4, 3))]
    place = placed(enable_prefix_caching=True, max_num_batched_tokens=64, max_model_len=700)
    (engine,) = simulate(
        plan_requests(arrivals, 0), place, LinearTimeModel(), budget=PlannedBudget()
    ).replicas
    assert engine.stats().prefix_hits == 512


def test_a_prompt_without_blocks_shares_nothing() -> None:
    first, second = PlannedRequest(0, 40, 1), PlannedRequest(0, 40, 1, blocks=(0,))
    assert set(first.prompt(3)) != set(first.prompt(4))
    assert not set(first.prompt(3)) & set(second.prompt(3))


def test_the_command_prints_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = shared_file("tokenizer/configs/Qwen2.5-32B-Instruct.config.json")
    page = tmp_path / "plan.html"
    words = ["info", str(file), "--plan", "--gpu", "h200", "--gpus", "1,64", "--requests", "70"]
    words += ["--output-len", "64", "--rate", "40", "--page", str(page)]
    assert cli.main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [case["gpus"] for case in plan["cases"]] == [1, 64]
    assert plan["engine"]["weight_bytes"] == 2 * shape("32B").num_parameters
    text = page.read_text()
    assert text.count("<svg") == 4 and "NaN" not in text
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "65.5 GB in bfloat16" in shown and "assumed" in shown


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--plan", "--gpu", "H1000"], "there are A100"),
        (["--gpu", "H100"], "add --plan"),
        (["--plan", "--gpu", "cpu"], "--calibrate"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    assert cli.main(["info", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line
