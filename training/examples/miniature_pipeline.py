"""s1 in miniature: select, train, force, plot, on two cores.

    python -m s1engine.training.miniature --out out/miniature

The story of the paper with a model of 0.8 M parameters and questions about chains modulo 10. The
base model is s1-nano made to answer at once: it is trained on bare answers, in chats with and
without a think block, and on worked solutions in plain text, so that it has the skill and not the
habit. A pool of questions gets traces from s1-nano and attempts from two base models, the funnel
chooses 1,000, and the base model is fine-tuned on them; likewise on 1,000 random ones, on the
longest, and on diverse ones. Held-out questions are then asked with every budget. What comes out is
what is reported.
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
from s1engine.training import rows
from s1engine.training.curate import diversity
from s1engine.training.curate.funnel import Candidate, Funnel
from s1engine.training.curate.model_answers import read_answers
from s1engine.training.curate.pipeline import CHOSEN, Asked, Curation, Source, curate, with_trace
from s1engine.training.examples.miniature_data import base_corpus, domain, pool
from s1engine.training.sft import trainer
from s1engine.training.sft.sft_config import SftConfig

BUDGETS = (0, 16, 32, 48, 64, 96, 128)
WAITS = (1, 2)
SELECTIONS = ("s1", "random", "longest", "diverse")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much of everything."""

    pool: int = 4000
    """Questions to choose from."""
    count: int = 1000
    """Questions chosen."""
    base_rows: int = 3000
    """Of the base model's training."""
    epochs: int = 3
    """Over the chosen questions."""
    asked: int = 500
    """Held-out questions."""
    seed: int = 0
    threads: int = 0


# --- models ---


def make_base(sizes: Sizes, folder: Path, name: str, count: int) -> Path:
    """s1-nano trained to answer at once."""
    data = folder / f"{name}.jsonl"
    rows.write_jsonl(data, base_corpus(count, sizes.seed))
    return _sft(sizes, folder / name, data, str(BUNDLED_MODEL), epochs=1, learning_rate=1e-3)


def _sft(sizes: Sizes, out: Path, data: Path, model: str, **fields: Any) -> Path:
    recipe = SftConfig.from_dict({
        "data": [str(data)], "out": str(out), "model": model, "compute_dtype": "float32",
        "gradient_checkpointing": False, "block_size": 512, "batch_rows": 4, "packing": True,
        "weight_decay": 0.01, "seed": sizes.seed, "threads": sizes.threads, "save_every": 0,
        **fields,
    })  # fmt: skip
    return trainer.train(recipe)


# --- choosing ---


def select(sizes: Sizes, folder: Path, bases: dict[str, Path]) -> dict[str, Path]:
    """The files of all selections; the first is the funnel's."""
    greedy = SamplingParams(temperature=0, max_tokens=512)
    at_once = SamplingParams(temperature=0, max_tokens=32)
    asked = generate(1_000 + sizes.seed, sizes.asked)
    plan = Curation(
        out=folder / "funnel",
        sources=[Source("pool", pool(sizes.pool, sizes.seed))],
        tests=[Source("held-out", [rows.Row(question.question) for question in asked])],
        teacher=Asked(EngineBackend(LLM(progress=False)), greedy),
        weak={
            name: Asked(EngineBackend(LLM(str(path), progress=False)), at_once)
            for name, path in bases.items()
        },
        domain=domain,
        num_tokens=len,  # characters are tokens in s1-nano's thinking, but for a few words
        count=sizes.count,
        seed=sizes.seed,
    )
    funnel = curate(plan)
    files = {"s1": plan.out / CHOSEN}
    traces = read_answers(plan.out / "asked-teacher.jsonl")
    everyone = {c.id: c for c in _with_traces(funnel)}
    options = [diversity.Option(c.id, domain(c.row), c.facts["length"]) for c in everyone.values()]
    choosers = {
        "random": diversity.uniform,
        "longest": diversity.longest,
        "diverse": diversity.by_domain,
    }
    for name, choose in choosers.items():
        ids = choose(options, sizes.count, sizes.seed)
        chosen = [rows.to_json(with_trace(everyone[one], plan, traces)) for one in ids]
        files[name] = folder / f"{name}.jsonl"
        rows.write_jsonl(files[name], chosen)
    return files


def _with_traces(funnel: Funnel) -> list[Candidate]:
    """All candidates with a trace, however far they came: what the ablations choose from."""
    gone = [candidate for candidate, _, _ in funnel.dropped]
    return [candidate for candidate in funnel.candidates + gone if "length" in candidate.facts]


# --- asking ---


def ask(model: Path, questions: Sequence[ArithmeticQuestion]) -> list[rows.Json]:
    """Accuracy at every budget (from one trace), unbounded, with waits, and without thinking."""
    llm = LLM(str(model), progress=False)
    chats = [[{"role": "user", "content": question.question}] for question in questions]
    found = []
    bare = llm.chat(chats, SamplingParams(temperature=0, max_tokens=128), progress=False,
                    enable_thinking=False)  # fmt: skip
    found.append(_run("without a think block", questions, [o.outputs[0] for o in bare]))
    for waits in (0, *WAITS):
        budget = ThinkingBudget(num_waits=waits, checkpoints=() if waits else BUDGETS)
        params = SamplingParams(temperature=0, max_tokens=1024, thinking=budget)
        outputs = llm.chat(chats, params, progress=False)
        for place, limit in enumerate(budget.checkpoints):
            each = [output.checkpoints[place].output for output in outputs]
            found.append(_run(f"budget {limit}", questions, each))
        name = f"{waits} wait{'s' * (waits > 1)}" if waits else "no limit"
        found.append(_run(name, questions, [output.outputs[0] for output in outputs]))
    return found


def _run(name: str, questions: Sequence[ArithmeticQuestion], outputs: Sequence[Any]) -> rows.Json:
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


# --- all of it ---


def run_miniature(sizes: Sizes, folder: Path) -> rows.Json:
    """The whole story; what it found, ready to be written."""
    folder.mkdir(parents=True, exist_ok=True)
    clock = time.perf_counter()
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name], clock = round(now - clock, 1), now
        print(f"{name}: {seconds[name]} s", file=sys.stderr)

    bases = {
        "base": make_base(sizes, folder, "base", sizes.base_rows),
        "weaker-base": make_base(sizes, folder, "weaker-base", sizes.base_rows // 3),
    }
    lap("base models")
    files = select(sizes, folder, bases)
    lap("curation")
    questions = generate(1_000 + sizes.seed, sizes.asked)
    models = {"base": bases["base"]}
    for name in SELECTIONS:
        models[name] = _sft(
            sizes, folder / f"sft-{name}", files[name], str(bases["base"]),
            epochs=sizes.epochs, learning_rate=5e-4,
        )  # fmt: skip
        lap(f"training on {name}")
    results = {name: ask(path, questions) for name, path in models.items()}
    lap("asking")
    return {
        "sizes": {name: getattr(sizes, name) for name in Sizes.__slots__},
        "funnel": json.loads((folder / "funnel" / "counts.json").read_text()),
        "mean_trace": {name: _mean_trace(path) for name, path in files.items()},
        "results": results,
        "against_s1": _against(results),
        "seconds": seconds,
    }


def _mean_trace(path: Path) -> float:
    lengths = [len(row["thinking_trajectories"][0]) for _, row in rows.read_jsonl(path, "data")]
    return round(sum(lengths) / len(lengths), 1)


def _against(results: dict[str, list[rows.Json]]) -> rows.Json:
    """Accuracy without a limit, less that of the s1 selection, with its paired interval."""

    def right(name: str) -> list[bool]:
        (row,) = [row for row in results[name] if row["run"] == "no limit"]
        return [mark == "1" for mark in row["right"]]

    found = {}
    for name in SELECTIONS[1:]:
        low, high = paired_interval(right("s1"), right(name), seed=0)
        change = 100 * (sum(right(name)) - sum(right("s1"))) / len(right(name))
        found[name] = {"difference": round(change, 2), "interval": [round(low, 2), round(high, 2)]}
    return found
