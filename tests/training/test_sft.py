"""Whole runs: equal for any split of the work, exact after a kill, usable in the engine."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from s1engine import LLM, SamplingParams
from s1engine.errors import RequestError
from s1engine.training.rows import write_jsonl
from s1engine.training.sft.checkpoint_manager import CheckpointManager, run_identity
from s1engine.training.sft.distributed import TrainingError, init_distributed
from s1engine.training.sft.model import SftModel, load_model
from s1engine.training.sft.optimizer import create_optimizer
from s1engine.training.sft.packing import PackedRow
from s1engine.training.sft.samples import load_tokenizer, load_training_set
from s1engine.training.sft.sft_config import SftConfig
from s1engine.training.sft.trainer import MODEL
from tests.training.small_runs import (
    FORKS,
    NANO,
    chain_rows,
    losses,
    read_log,
    recipe,
    train_here,
    train_on,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sft")


@pytest.fixture(scope="module")
def whole(folder: Path) -> SftConfig:
    """A run from beginning to end, in this process: 8 steps."""
    config = recipe(folder, "whole", packing=False, batch_rows=3)
    train_here(config)
    return config


def weights(config: SftConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.out) / MODEL / "model.safetensors")


def test_a_run_learns_and_logs_every_step(whole: SftConfig) -> None:
    rows = read_log(whole)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["learning_rate"] == 0 and rows[1]["learning_rate"] == pytest.approx(1e-3)
    assert all(row["mfu"] > 0 and row["memory_gb"] > 0 for row in rows)
    assert (Path(whole.out) / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_run(whole: SftConfig, folder: Path) -> None:
    again = recipe(folder, "again", packing=False, batch_rows=3)
    train_here(again)
    assert losses(again) == losses(whole)
    assert all(torch.equal(a, weights(again)[name]) for name, a in weights(whole).items())
    other = recipe(folder, "other", packing=False, batch_rows=3, seed=7, epochs=1)
    train_here(other)
    assert losses(other)[0] != losses(whole)[0]


def test_rows_of_unequal_length_weigh_by_their_tokens(whole: SftConfig, folder: Path) -> None:
    """Three micro-batches of one sample are one row of three: the mean is over tokens."""
    batch = recipe(folder, "batch", rows=3, packing=True, batch_rows=1, block_size=512, epochs=4)
    split = recipe(folder, "split", rows=3, packing=False, batch_rows=3, epochs=4)
    train_here(batch)
    train_here(split)
    assert losses(batch) == pytest.approx(losses(split), rel=1e-5)


def test_a_killed_run_resumes_bit_for_bit(whole: SftConfig, folder: Path) -> None:
    config = recipe(folder, "killed", packing=False, batch_rows=3)
    die_after = random.Random(os.getpid()).randint(1, 6)
    process = FORKS.Process(target=train_here, args=(config,))
    process.start()
    path = Path(config.out) / "log.jsonl"
    while process.is_alive() and not (path.exists() and path.read_text().count("\n") >= die_after):
        time.sleep(0.002)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it should not have finished"
    train_here(config)
    assert losses(config) == losses(whole)
    assert all(torch.equal(a, weights(config)[name]) for name, a in weights(whole).items())


def test_a_run_resumes_on_another_number_of_ranks(whole: SftConfig, folder: Path) -> None:
    """2 -> 1 ranks and 1 -> 2, each from the other's checkpoint. ``epochs`` must not change, so the
    newer checkpoints are removed."""
    config = recipe(folder, "ranks", packing=False, batch_rows=3, keep=9)
    train_on(2, config)
    on_two = losses(config)
    assert on_two == pytest.approx(losses(whole), rel=1e-4)
    remove_after(config, 6)
    train_here(config)
    assert losses(config)[:6] == on_two[:6]
    assert losses(config)[6:] == pytest.approx(losses(whole)[6:], rel=1e-4)
    remove_after(config, 4)
    remove_after(whole_copy := recipe(folder, "copy", packing=False, batch_rows=3, keep=9), 0)
    train_here(whole_copy)
    remove_after(whole_copy, 4)
    train_on(2, whole_copy)
    assert losses(whole_copy)[:4] == losses(whole)[:4]
    assert losses(whole_copy)[4:] == pytest.approx(losses(whole)[4:], rel=1e-4)


def remove_after(config: SftConfig, step: int) -> None:
    for path in Path(config.out).glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            for file in sorted(path.iterdir()):
                file.unlink()
            path.rmdir()


def test_an_incomplete_checkpoint_is_ignored(folder: Path, whole: SftConfig) -> None:
    config = recipe(folder, "half", packing=False, batch_rows=3, keep=9)
    train_here(config)
    remove_after(config, 2)
    for name in (".step-00000004.partial", "step-00000006"):
        (Path(config.out) / name).mkdir()
        (Path(config.out) / name / "__0_0.distcp").write_bytes(b"half")
    train_here(config)
    assert losses(config) == losses(whole)


def test_another_recipe_cannot_resume_these_checkpoints(whole: SftConfig) -> None:
    changed = SftConfig.from_dict(whole.to_json() | {"learning_rate": 0.5})
    with pytest.raises(RequestError, match="learning_rate"):
        train_here(changed)


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(folder: Path) -> None:
    """A file size limit acts as the disk, so the writer gets a real system error."""
    config = recipe(folder, "full", packing=False, batch_rows=3)
    process = FORKS.Process(target=train_with_little_disk, args=(config,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not list(Path(config.out).glob(".*partial"))
    assert [path.name for path in Path(config.out).glob("step-*")] == ["step-00000002"]


def train_with_little_disk(config: SftConfig) -> None:
    publish = CheckpointManager._publish

    def publish_then_limit(self: CheckpointManager, *args: object) -> None:
        publish(self, *args)  # type: ignore[arg-type]
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    CheckpointManager._publish = publish_then_limit  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"last good checkpoint is .*step-00000002"):
        train_here(config)


def test_a_dead_rank_ends_all_and_leaves_a_good_checkpoint(folder: Path) -> None:
    config = recipe(folder, "torchrun", packing=False, batch_rows=3, epochs=500)
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(config.to_json()))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "s1engine.training.sft", str(file),
    ]  # fmt: skip
    agent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    checkpoints = CheckpointManager(Path(config.out), None, {}, 1)  # type: ignore[arg-type]
    while agent.poll() is None and checkpoints.newest() is None:
        time.sleep(0.05)
    ranks = children(agent.pid)
    assert sorted(ranks) == ["0", "1"]
    os.kill(ranks["1"], signal.SIGKILL)
    _, errors = agent.communicate()
    assert agent.returncode != 0
    assert "Signal 9 (SIGKILL)" in errors
    assert not [rank for rank, pid in ranks.items() if Path(f"/proc/{pid}").exists()]
    with init_distributed(1) as alone:
        data = load_training_set(config, load_tokenizer(config))
        model = load_model(config, alone)
        identity = run_identity(config, data)
        resumed = CheckpointManager(Path(config.out), alone, identity, 1).resume(
            model, create_optimizer(model, config)
        )
    assert resumed >= 2


def children(parent: int) -> dict[str, int]:
    """Process ids of torchrun's ranks."""
    pids = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            environment = (path / "environ").read_text().split("\0")
        except OSError:
            continue
        ranks = [one.removeprefix("RANK=") for one in environment if one.startswith("RANK=")]
        if int(fields[1]) == parent and ranks:
            pids[ranks[0]] = int(path.name)
    return pids


def test_a_nan_loss_stops_and_names_the_samples(folder: Path) -> None:
    config = recipe(folder, "nan", packing=False, batch_rows=3)
    original = SftModel.forward

    def poisoned_forward(self: SftModel, row: PackedRow) -> torch.Tensor:
        bad = float("nan") if row.lengths == [target] else 1.0
        return original(self, row) * bad

    sample = load_training_set(config, load_tokenizer(config)).samples[5]
    target = len(sample.ids)
    SftModel.forward = poisoned_forward  # type: ignore[method-assign]
    try:
        with pytest.raises(TrainingError, match=r"loss nan.*batch: rows-12.jsonl:\d+"):
            train_here(config)
    finally:
        SftModel.forward = original  # type: ignore[method-assign]


def test_the_trained_model_answers_in_the_engine(tmp_path: Path) -> None:
    """s1-nano's weights, loaded shard by shard, trained for a step, then loaded by the engine."""
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, chain_rows(8))
    config = recipe(
        tmp_path, "nano", data=[str(data)], architecture=None, model="s1-nano", tokenizer=None,
        learning_rate=1e-6, epochs=1, gradient_checkpointing=True, save_every=0,
    )  # fmt: skip
    train_here(config)
    assert losses(config)[0] < 0.1, "s1-nano knows this task; its weights did not arrive"
    llm = LLM(str(Path(config.out) / MODEL), progress=False)
    (output,) = llm.chat(
        [{"role": "user", "content": "k=3 b=k+4 x=b*2 x?"}],
        SamplingParams(temperature=0, max_tokens=100),
        progress=False,
    )
    assert output.outputs[0].text.strip().endswith("4")
    assert output.outputs[0].thinking is not None
    original = load_file(NANO / "model.safetensors")
    assert weights(config).keys() == original.keys()
