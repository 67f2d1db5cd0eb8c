"""Small runs: arithmetic rows, a model of a few thousand weights, ranks as processes."""

import json
import multiprocessing
import os
import random
import socket
from pathlib import Path
from typing import Any

from s1engine.eval.arithmetic import draw_steps, render
from s1engine.training.examples.arithmetic_traces import one_pass
from s1engine.training.rows import Json, write_jsonl
from s1engine.training.sft.sft_config import SftConfig

NANO = Path(__file__).resolve().parents[2] / "s1engine" / "assets" / "s1-nano"
SHAPE: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "bos_token_id": None,
    "pad_token_id": 0,
}
# Forked processes have torch and the trainer imported already, and inherit no threads.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["s1engine.training.sft.trainer", "tests.training.small_runs"])


def chain_rows(count: int, seed: int = 0) -> list[Json]:
    """s1K rows: chains of 2 to 6 definitions, solved line by line."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        steps = draw_steps(rng, rng.randint(2, 6))
        thinking = "".join(piece.text for piece in one_pass(steps, None, rng))
        answer = str(steps[-1].value)
        rows.append(
            {
                "question": render(steps),
                "solution": answer,
                "thinking_trajectories": [thinking],
                "attempt": f"Final Answer: {answer}",
            }
        )
    return rows


def recipe(folder: Path, name: str = "run", rows: int = 12, **fields: Any) -> SftConfig:
    """The recipe of a run over ``rows`` rows, in ``folder / name``."""
    data = folder / f"rows-{rows}.jsonl"
    if not data.exists():
        write_jsonl(data, chain_rows(rows))
    defaults: dict[str, Any] = {
        "data": [str(data)],
        "out": str(folder / name),
        "architecture": SHAPE,
        "tokenizer": str(NANO),
        "compute_dtype": "float32",
        "gradient_checkpointing": False,
        "block_size": 256,
        "batch_rows": 2,
        "epochs": 2,
        "learning_rate": 1e-3,
        "save_every": 2,
        "threads": 1,
    }
    return SftConfig.from_dict({**defaults, **fields})


def read_log(config: SftConfig) -> list[Json]:
    return [json.loads(line) for line in (Path(config.out) / "log.jsonl").open()]


def losses(config: SftConfig) -> list[float]:
    return [row["loss"] for row in read_log(config)]


def train_here(config: SftConfig) -> None:
    from s1engine.training.sft.trainer import train

    train(config, progress=False)


def run_as_rank(rank: int, world_size: int, port: int, config: SftConfig) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    train_here(config)


def train_on(world_size: int, config: SftConfig) -> None:
    """Trains in ``world_size`` processes, as torchrun starts them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = [
        FORKS.Process(target=run_as_rank, args=(rank, world_size, port, config))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * world_size
