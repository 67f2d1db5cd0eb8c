"""s1 in miniature: the paper with a model of 0.8 M parameters and questions about chains modulo 10.

The base model is s1-nano retrained to answer at once: on bare answers, in chats with and without a
think block, and on worked solutions in plain text. So it has the skill but not the habit. A pool of
questions gets traces from s1-nano and attempts from two base models. The funnel selects 1,000, and
the base model is fine-tuned on them; likewise on 1,000 random ones, on the longest, and on diverse
ones. Every model then answers held-out questions with every budget.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s1engine.config import BUNDLED_MODEL
from s1engine.engine.llm import LLM
from s1engine.eval.arithmetic import ArithmeticQuestion, generate
from s1engine.eval.engine_backend import EngineBackend
from s1engine.eval.grade import extract_answer
from s1engine.eval.metrics import bootstrap_interval, paired_interval
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from s1engine.training.curate import diversity
from s1engine.training.curate.curation_config import CurationConfig, QueriedModel, QuestionSource
from s1engine.training.curate.funnel import Candidate, Funnel
from s1engine.training.curate.model_answers import load_answers
from s1engine.training.curate.pipeline import CHOSEN, curate, output_row
from s1engine.training.examples.miniature_data import (
    base_corpus,
    question_domain,
    question_pool,
)
from s1engine.training.rows import Json, TrainingRow, format_row, read_jsonl, write_jsonl
from s1engine.training.sft.sft_config import SftConfig
from s1engine.training.sft.trainer import train

BUDGETS = (0, 16, 32, 48, 64, 96, 128)
WAITS = (1, 2)
SELECTIONS = ("s1", "random", "longest", "diverse")


@dataclass(frozen=True, kw_only=True, slots=True)
class MiniatureSizes:
    """Numbers of questions, rows and epochs."""

    pool: int = 4000
    """Questions to select from."""
    count: int = 1000
    """Questions selected."""
    base_rows: int = 3000
    """Training rows of the base model."""
    epochs: int = 3
    """Over the selected questions."""
    asked: int = 500
    """Held-out questions."""
    seed: int = 0
    threads: int = 0


def run_miniature(sizes: MiniatureSizes, folder: Path) -> Json:
    """Runs all steps; returns the report."""
    folder.mkdir(parents=True, exist_ok=True)
    clock = time.perf_counter()
    seconds: dict[str, float] = {}

    def record_time(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name], clock = round(now - clock, 1), now
        print(f"{name}: {seconds[name]} s", file=sys.stderr)

    bases = {
        "base": train_base(sizes, folder, "base", sizes.base_rows),
        "weaker-base": train_base(sizes, folder, "weaker-base", sizes.base_rows // 3),
    }
    record_time("base models")
    files = select(sizes, folder, bases)
    record_time("curation")
    questions = generate(1_000 + sizes.seed, sizes.asked)
    models = {"base": bases["base"]}
    for name in SELECTIONS:
        models[name] = _fine_tune(
            sizes, folder / f"sft-{name}", files[name], str(bases["base"]),
            epochs=sizes.epochs, learning_rate=5e-4,
        )  # fmt: skip
        record_time(f"training on {name}")
    results = {name: evaluate(path, questions) for name, path in models.items()}
    record_time("asking")
    return {
        "sizes": {name: getattr(sizes, name) for name in MiniatureSizes.__slots__},
        "funnel": json.loads((folder / "funnel" / "counts.json").read_text()),
        "mean_trace": {name: _mean_trace(path) for name, path in files.items()},
        "results": results,
        "against_s1": _compare_with_s1(results),
        "seconds": seconds,
    }


# --- training ---


def train_base(sizes: MiniatureSizes, folder: Path, name: str, count: int) -> Path:
    """Trains s1-nano to answer at once."""
    data = folder / f"{name}.jsonl"
    write_jsonl(data, base_corpus(count, sizes.seed))
    return _fine_tune(sizes, folder / name, data, str(BUNDLED_MODEL), epochs=1, learning_rate=1e-3)


def _fine_tune(sizes: MiniatureSizes, out: Path, data: Path, model: str, **fields: Any) -> Path:
    recipe = SftConfig.from_dict({
        "data": [str(data)], "out": str(out), "model": model, "compute_dtype": "float32",
        "gradient_checkpointing": False, "block_size": 512, "batch_rows": 4, "packing": True,
        "weight_decay": 0.01, "seed": sizes.seed, "threads": sizes.threads, "save_every": 0,
        **fields,
    })  # fmt: skip
    return train(recipe)


# --- selection ---


def select(sizes: MiniatureSizes, folder: Path, bases: dict[str, Path]) -> dict[str, Path]:
    """Training data files by selection; the first one is the funnel's."""
    greedy = SamplingParams(temperature=0, max_tokens=512)
    at_once = SamplingParams(temperature=0, max_tokens=32)
    held_out = generate(1_000 + sizes.seed, sizes.asked)
    config = CurationConfig(
        out=folder / "funnel",
        sources=[QuestionSource("pool", question_pool(sizes.pool, sizes.seed))],
        tests=[QuestionSource("held-out", [TrainingRow(one.question) for one in held_out])],
        teacher=QueriedModel(EngineBackend(LLM(progress=False)), greedy),
        weak={
            name: QueriedModel(EngineBackend(LLM(str(path), progress=False)), at_once)
            for name, path in bases.items()
        },
        domain=question_domain,
        num_tokens=len,  # most tokens of s1-nano's thinking are single characters
        count=sizes.count,
        seed=sizes.seed,
    )
    funnel = curate(config)
    files = {"s1": config.out / CHOSEN}
    traces = load_answers(config.out / "asked-teacher.jsonl")
    candidates = {c.id: c for c in _candidates_with_traces(funnel)}
    questions = [
        diversity.SelectableQuestion(c.id, question_domain(c.row), c.facts["length"])
        for c in candidates.values()
    ]
    draws = {
        "random": diversity.uniform,
        "longest": diversity.longest,
        "diverse": diversity.by_domain,
    }
    for name, draw in draws.items():
        ids = draw(questions, sizes.count, sizes.seed)
        chosen = [format_row(output_row(candidates[one], config, traces)) for one in ids]
        files[name] = folder / f"{name}.jsonl"
        write_jsonl(files[name], chosen)
    return files


def _candidates_with_traces(funnel: Funnel) -> list[Candidate]:
    """All candidates with a trace, dropped later or not: the pool of the other selections."""
    dropped = [candidate for candidate, _, _ in funnel.dropped]
    return [candidate for candidate in funnel.candidates + dropped if "length" in candidate.facts]


def _mean_trace(path: Path) -> float:
    lengths = [len(row["thinking_trajectories"][0]) for _, row in read_jsonl(path, "data")]
    return round(sum(lengths) / len(lengths), 1)


# --- evaluation ---


def evaluate(model: Path, questions: Sequence[ArithmeticQuestion]) -> list[Json]:
    """Accuracy without thinking, at every budget (from one trace), unbounded, and with waits."""
    llm = LLM(str(model), progress=False)
    chats = [[{"role": "user", "content": question.question}] for question in questions]
    no_thinking = llm.chat(chats, SamplingParams(temperature=0, max_tokens=128), progress=False,
                           enable_thinking=False)  # fmt: skip
    runs = [_score("without a think block", questions, [o.outputs[0] for o in no_thinking])]
    for waits in (0, *WAITS):
        budget = ThinkingBudget(num_waits=waits, checkpoints=() if waits else BUDGETS)
        params = SamplingParams(temperature=0, max_tokens=1024, thinking=budget)
        outputs = llm.chat(chats, params, progress=False)
        for index, limit in enumerate(budget.checkpoints):
            answers = [output.checkpoints[index].output for output in outputs]
            runs.append(_score(f"budget {limit}", questions, answers))
        name = f"{waits} wait{'s' * (waits > 1)}" if waits else "no limit"
        runs.append(_score(name, questions, [output.outputs[0] for output in outputs]))
    return runs


def _score(name: str, questions: Sequence[ArithmeticQuestion], outputs: Sequence[Any]) -> Json:
    right = [
        extract_answer(output.text) == question.answer
        for output, question in zip(outputs, questions, strict=True)
    ]
    thinking = [output.thinking.tokens if output.thinking else 0 for output in outputs]
    low, high = bootstrap_interval(right, seed=0)
    return {
        "run": name,
        "accuracy": round(100 * sum(right) / len(right), 2),
        "interval": [round(low, 2), round(high, 2)],
        "thinking_tokens": round(sum(thinking) / len(thinking), 1),
        "right": "".join(str(int(one)) for one in right),
    }


def _compare_with_s1(results: dict[str, list[Json]]) -> Json:
    """Accuracy without a limit minus that of the s1 selection, with its paired interval."""

    def unlimited(name: str) -> list[bool]:
        (row,) = [row for row in results[name] if row["run"] == "no limit"]
        return [mark == "1" for mark in row["right"]]

    differences = {}
    base = unlimited("s1")
    for name in SELECTIONS[1:]:
        other = unlimited(name)
        low, high = paired_interval(base, other, seed=0)
        change = 100 * (sum(other) - sum(base)) / len(other)
        differences[name] = {
            "difference": round(change, 2),
            "interval": [round(low, 2), round(high, 2)],
        }
    return differences
