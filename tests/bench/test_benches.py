"""The benches and studies, on the CPU at the bundled model's shapes."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from s1engine.bench import command, compare, latency, numerics, qualify
from s1engine.bench.bare_engine import BareEngine, make_decoder
from s1engine.bench.kernel_work import KERNELS, BenchSetup
from s1engine.bench.shapes import shape, step_bytes
from s1engine.bench.studies import __main__ as studies
from s1engine.config import EngineConfig
from s1engine.errors import RequestError
from s1engine.ops.cpu_ops import CpuOps
from s1engine.runner.interface import ModelRunnerOutput, SchedulerOutput
from s1engine.sampling_params import SamplingParams

SETUP = BenchSetup(shape("nano"), torch.float32, "cpu")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    status = command.run(parser.parse_args(words))
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def run_study(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    status = studies.main(words)
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_kernels_are_compared_with_ceiling_and_baseline(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plot = tmp_path / "roofline.png"
    words = ("--kernels", "rms_norm,decode", "--shape", "nano", "--batch", "1,2", "--context", "70")
    status, found = run(capsys, "kernels", *words, "--device", "cpu", "--plot", str(plot))
    assert status == 0 and plot.read_bytes().startswith(b"\x89PNG")
    assert [(row["kernel"], row["batch"]) for row in found["rows"]] == [
        ("rms_norm", 1), ("rms_norm", 2), ("decode", 1), ("decode", 2),
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["speedup"] == pytest.approx(row["baseline_us"] / row["us"], rel=0.05)


def test_ranks_are_compared_with_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("--shape", "nano", "--rows", "1,2", "--rounds", "1", "--max-tokens", "3")
    status, found = run_study(capsys, "tensor_parallel", *words, "--work", str(tmp_path))
    assert status == 0 and all(us > 0 for us in found["sum_us"].values())
    one, two = found["tokens_per_s"].values()
    for rows, ratio in found["ratio"].items():
        assert ratio == pytest.approx(two[rows] / one[rows], abs=0.01)


def test_implementations_of_a_model_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--batch", "1,2", "--tokens", "3", "--rounds", "1")
    status, found = run_study(capsys, "model_impl", *words)
    assert status == 0
    for model in ("s1-nano", "26M"):
        for batch in (1, 2):
            row = found[f"{model}, batch {batch}"]
            rates = row["native_tokens_per_s"], row["transformers_tokens_per_s"]
            assert row["ratio"] == pytest.approx(rates[0] / rates[1], rel=0.01)


def test_replicas_are_compared_with_one_server(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--replicas", "0", "--streams", "1,2", "--output-len", "8", "--rounds", "1")
    status, found = run_study(capsys, "replica_cost", *words)
    assert status == 0 and [one["streams"] for one in found["runs"]] == [1, 2]
    for one in found["runs"]:
        assert one["failed"] == 0 and one["output_throughput"] > 0
        assert one["ratio"]["output_throughput"] == 1.0
        assert all(ratio == (1.0 if one[name] else None) for name, ratio in one["ratio"].items())


def test_an_unknown_kernel_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match="'gemm' is unknown; there are rms_norm"):
        run(capsys, "kernels", "--kernels", "gemm", "--device", "cpu")
    with pytest.raises(RequestError, match="batch must be positive"):
        run(capsys, "kernels", "--batch", "0", "--device", "cpu")


@pytest.mark.parametrize("name", list(KERNELS))
def test_ours_and_the_baseline_compute_the_same(name: str) -> None:
    """Same output sizes."""
    work = KERNELS[name](SETUP, CpuOps(), 2, 70)
    ours, baseline = work.ours(), work.baseline()
    assert isinstance(ours, Tensor) and isinstance(baseline, Tensor)
    assert ours.numel() == baseline.numel() and work.nbytes > 0


@pytest.mark.parametrize("params", list(latency.SAMPLINGS.values()))
def test_every_mixed_step_has_a_chunk_and_all_rows(params: SamplingParams) -> None:
    """And the prefill ends with the last row's first token, not with as many tokens as rows."""
    batch, prompt, chunk = 3, 24, 7
    config = EngineConfig(
        device="cpu", dtype="float32", max_num_seqs=4, max_num_batched_tokens=batch + chunk,
        max_step_ms=0, kv_cache_memory_gb=0.05,
    )  # fmt: skip
    engine = BareEngine(config, SETUP.model, make_decoder(SETUP.model, config))
    sizes: list[tuple[int, int]] = []
    execute = engine.runner.execute

    def watched(step: SchedulerOutput) -> ModelRunnerOutput:
        sizes.append(engine.runner.batch.sizes[:2])
        return execute(step)

    engine.runner.execute = watched  # type: ignore[method-assign]
    counts = {"batch": batch, "prompt": prompt, "steps": 5, "thinks": False, "params": params}
    latency.decode(engine, **counts, chunk=chunk)  # type: ignore[arg-type]
    mixed = sizes[-latency.WARM_UP_STEPS - 5 :]
    assert set(mixed) == {(batch + chunk, batch + 1)}
    assert sum(tokens for tokens, _ in sizes[: -len(mixed)]) > batch * prompt
    assert not engine.scheduler.has_unfinished()
    sizes.clear()
    latency.decode(engine, **counts)  # type: ignore[arg-type]
    assert set(sizes[-5:]) == {(batch, batch)}


def test_a_step_reads_weights_and_cache() -> None:
    model = shape("7B")
    weights = step_bytes(model, 2, 0, 0)
    assert weights == pytest.approx(14.14e9, rel=0.01)
    assert step_bytes(model, 2, 3, 1000) - weights == 3 * 1000 * 57_344


def test_the_qualification_runs_anywhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("--shapes", "nano", "--batch", "2", "--context", "64", "--steps", "8")
    status, found = run(
        capsys, "qualify", *words, "--minutes", "0.2", "--device", "cpu", "--out", str(tmp_path)
    )
    assert found["failures"] == []
    assert status == 0
    equal = found["engine"]["nano"]["equal"]
    assert equal["graph_is_eager"] is True and equal["three_chunks_are_one"] is True
    assert all(row["ok"] for row in found["numerics"].values())
    saved = json.loads((tmp_path / "qualify.json").read_text())
    assert set(saved) >= set(qualify.PHASES)
    assert "## Numerics" in (tmp_path / "qualify.md").read_text()


@pytest.mark.parametrize(("phases", "problem"), [("speed", "none of"), ("engine", "ceilings")])
def test_impossible_phases_are_rejected(phases: str, problem: str) -> None:
    parser = argparse.ArgumentParser()
    qualify.add_arguments(parser)
    with pytest.raises(RequestError, match=problem):
        qualify.run(parser.parse_args(["--phases", phases, "--device", "cpu"]))


class Broken(CpuOps):
    """Leaves its output uninitialised."""

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return torch.empty(len(gate_up), gate_up.shape[1] // 2)


class Rough(CpuOps):
    """Is off by a thousandth."""

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return super().silu_and_mul(gate_up) * 1.001


@pytest.mark.parametrize("ops", [Broken(), Rough()])
def test_wrong_operations_do_not_qualify(ops: CpuOps) -> None:
    call = numerics.silu_call(SETUP, 7)
    assert numerics.compare_with_oracle(call, CpuOps(), torch.float32)["ok"]
    assert not numerics.compare_with_oracle(call, ops, torch.float32)["ok"]


def test_a_failed_phase_stops_no_other(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(shared: object) -> object:
        raise ValueError("no such kernel")

    monkeypatch.setattr(qualify, "PHASES", {"first": (0.1, fail), "second": (0.1, lambda s: 7)})
    status, found = run(capsys, "qualify", "--device", "cpu", "--out", str(tmp_path))
    assert status == 1 and found["second"] == 7
    assert "first: Traceback" in found["failures"][0] and "no such kernel" in found["failures"][0]


def test_no_shipped_module_needs_the_studies() -> None:
    """A wheel does not hold them, so no subcommand is a study and no module imports one."""
    folder = Path(command.__file__).parent
    shipped = "".join(path.read_text() for path in folder.glob("*.py"))
    assert "bench.studies " not in shipped and "import studies" not in shipped
    assert not set(command.BENCHES.values()) & {f"studies.{name}" for name in studies.NAMES}
    listed = (folder / "studies" / "README.md").read_text()
    assert all(f"| `{name}` |" in listed for name in studies.NAMES)


results = st.recursive(
    st.floats(0.1, 100),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(results)
def test_nothing_changed_between_a_result_and_itself(result: Any) -> None:
    assert compare.changes(result, result, 0.0) == []


def test_changes_are_matched_by_what_rows_measure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, times in zip(paths, ((10.0, 5.0), (5.0, 5.1)), strict=True):
        rows = [{"kernel": k, "us": us} for k, us in zip(("norm", "decode"), times, strict=True)]
        path.write_text(json.dumps({"bench": "kernels", "rows": rows, "where": {"cores": 2}}))
    _, found = run(capsys, "compare", *map(str, paths))
    assert found["changed"] == [{"place": "rows[norm].us", "before": 10.0, "after": 5.0}]
    paths[1].write_text('{"bench": "host"}')
    with pytest.raises(RequestError, match="a result of host, not of kernels"):
        run(capsys, "compare", *map(str, paths))


def test_quantized_weights_are_measured_on_texts_of_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "problems.jsonl"
    rows = [{"problem": f"a={n} b=a+1 b?", "solution": f"a is {n}, b is {n + 1}"} for n in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)))
    status, found = run_study(capsys, "quantized_weights", "--traces", "2", "--text", str(file))
    assert status == 0 and found["text"] == "problems.jsonl" and found["traces"] == 2
    assert 0 < found["rows"]["int8"]["kl_mean"] < found["rows"]["int4"]["kl_mean"]


def test_quantized_weights_are_compared_with_the_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, found = run_study(capsys, "quantized_weights", "--traces", "2")
    rows = found["rows"]
    assert status == 0 and rows["int8"]["kl_mean"] < rows["int4"]["kl_mean"]
    assert rows["int8"]["greedy_agreement"] > 0.99
    assert 0 < rows["fp8, format alone"]["kl_mean"] < rows["fp8"]["kl_mean"]
    assert found["text"] is None
    sizes = found["weight_bytes"]
    assert sizes["int4"] < sizes["int8"] < sizes["fp8"] < sizes["bfloat16"]
