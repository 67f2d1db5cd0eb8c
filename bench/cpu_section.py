"""Engines side by side in one case: started one by one, then taking turns, the others stopped.

Owns what is measured when, and that an engine that fails leaves the others alone. Where engines
live and what is done with the rows is the command's affair.
"""

import mmap
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from s1engine.bench.cpu_cases import Case, Times, agreement, figures, headline
from s1engine.bench.cpu_engines import Engine, EngineError
from s1engine.bench.cpu_model import model_dir
from s1engine.bench.peers.protocol import Setup
from s1engine.models.model_config import ModelConfig

OURS = "s1engine"
READ_BYTES = 2**30  # far more than any cache


class ReadTest:
    """A sum over memory that no cache holds, on huge pages where there are any, as weights are.

    Other guests of a machine change what it reads from one second to the next, so a figure is worth
    something only beside what was measured in the same moment.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        area = mmap.mmap(-1, READ_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            area.madvise(mmap.MADV_HUGEPAGE)
        self._data = torch.frombuffer(area, dtype=torch.int64)
        self._data.fill_(1)  # untouched pages are one and the same

    def gb_per_s(self, rounds: int = 3) -> float:
        """Of the median round."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            self._data.sum()
            seconds.append(time.perf_counter() - begin)
        torch.set_num_threads(before)
        return READ_BYTES / statistics.median(seconds) / 1e9


@dataclass(frozen=True, slots=True)
class Plan:
    """What all sections of one call share."""

    engines: dict[str, Path]  # environments, in the order of starting
    work: Path  # models, conversions and logs
    threads: int
    rounds: int
    limit_s: float
    split: bool  # measure the time to the first tokens as well


@dataclass(slots=True)
class Runner:
    """A started engine and what it has done."""

    engine: Engine
    about: dict[str, Any]
    times: Times = field(default_factory=Times)
    tokens: list[list[int]] = field(default_factory=list)  # of all whole runs
    reads: list[float] = field(default_factory=list)  # GB/s of the read test, around each round

    def generate(self, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        """Seconds and ids. Raises EngineError unless there are ``new`` for every prompt."""
        answer = self.engine.ask("generate", prompts=prompts, new=new)
        lengths = [len(ids) for ids in answer["ids"]]
        if lengths != [new] * len(prompts):
            raise EngineError(f"generated {lengths} tokens, not {new} for each prompt")
        return answer["seconds"], answer["ids"]

    def turn(self, prompts: list[list[int]], new: int, split: bool, read: ReadTest) -> None:
        """One round, between two read tests."""
        before = read.gb_per_s()
        if split and new > 1:
            self.times.first.append(self.generate(prompts, 1)[0])
        seconds, ids = self.generate(prompts, new)
        self.times.whole.append(seconds)
        self.tokens += ids
        self.reads.append((before + read.gb_per_s()) / 2)


@dataclass(slots=True)
class Section:
    """One shape, precision and case."""

    plan: Plan
    shape: str
    model: ModelConfig
    precision: str
    case_name: str
    case: Case
    failures: list[str] = field(default_factory=list)

    def run(self) -> list[dict[str, Any]]:
        """A row for each engine that got through; why others did not stands in ``failures``."""
        begin = time.perf_counter()
        with ExitStack() as stack:
            runners: dict[str, Runner] = {}
            for name in self.plan.engines:
                with self._alone(name, runners):
                    runners[name] = self._start(name, stack)
            self._rounds(runners, begin)
            rows = []
            for name, runner in list(runners.items()):
                with self._alone(name, runners):
                    rows.append(self._row(name, runner, runners.get(OURS)))
        ours = next((headline(row) for row in rows if row["engine"] == OURS), None)
        for row in rows:
            own = headline(row)
            row["ours_to_it"] = round(ours / own, 3) if ours and own else None
        return rows

    @contextmanager
    def _alone(self, name: str, runners: dict[str, Runner]) -> Iterator[None]:
        """An engine that fails is out of this section; the others go on."""
        try:
            yield
        except EngineError as error:
            runners.pop(name, None)
            self.failures.append(f"{self} {name}: {error}")
            print(self.failures[-1], file=sys.stderr)

    def __str__(self) -> str:
        return f"{self.shape} {self.precision} {self.case_name}"

    def _start(self, name: str, stack: ExitStack) -> Runner:
        target = self.converted(name)
        engine = stack.enter_context(self._process(name))
        setup = Setup(
            precision=self.precision,
            threads=self.plan.threads,
            max_seqs=len(self.case.lengths),
            max_len=self.case.max_len,
            kv_tokens=self.case.total_len,
            kv_token_bytes=self.model.kv_bytes_per_token(torch.bfloat16),
        )
        about = engine.ask("load", target=str(target), setup=asdict(setup))
        about["start_s"] = time.perf_counter() - engine.begun
        print(f"{self} {name}: started in {about['start_s']:.1f} s", file=sys.stderr)
        warm = self.case.prompts(self.model.vocab_size, seed=-1)[:4]
        engine.ask("generate", prompts=warm, new=min(self.case.new, 8))
        return Runner(engine, about)

    def converted(self, name: str) -> Path:
        """What the engine loads, made once by a process of its own and kept."""
        source = model_dir(self.model, self.shape, self.plan.work)
        target = self.plan.work / f"{self.shape}-{self.precision}-{name}"
        done = target.with_name(target.name + ".done")
        if not done.exists():
            _remove(target)
            with self._process(name) as engine:
                engine.ask(
                    "convert", source=str(source), target=str(target), precision=self.precision
                )
            done.touch()
        return target

    @contextmanager
    def _process(self, name: str) -> Iterator[Engine]:
        work = self.plan.work
        log, cache = work / f"{name}.log", work / "cache"
        engine = Engine(name, self.plan.engines[name], self.plan.threads, log, cache)
        try:
            yield engine
        finally:
            engine.close()

    def _rounds(self, runners: dict[str, Runner], begin: float) -> None:
        """Rounds in which every engine has its turn, each time another one first; none begins that
        would end after the limit, going by the longest so far."""
        longest, read = 0.0, ReadTest(self.plan.threads)
        for number in range(self.plan.rounds):
            started = time.perf_counter()
            if number and started + longest > begin + self.plan.limit_s:
                return
            prompts = self.case.prompts(self.model.vocab_size, seed=number)
            for name in rotated(list(runners), number):
                with self._alone(name, runners):
                    runners[name].turn(prompts, self.case.new, self.plan.split, read)
            longest = max(longest, time.perf_counter() - started)

    def _row(self, name: str, runner: Runner, ours: Runner | None) -> dict[str, Any]:
        found = {
            "shape": self.shape,
            "precision": self.precision,
            "case": self.case_name,
            "engine": name,
            "version": runner.about["version"],
            "prompt_tokens": sum(self.case.lengths),
            "new_tokens": self.case.new * len(self.case.lengths),
            **figures(self.case, runner.times, self.model, self.precision),
            "peak_mib": round(runner.engine.peak_mib()),
            **{key: round(runner.about[key], 3) for key in ("start_s", "load_s", "first_token_s")},
        }
        found["read_test_gb_per_s"] = round(statistics.median(runner.reads), 2)
        if "read_gb_per_s" in found:
            found["share_of_read"] = round(share_of_read(found, runner), 3)
        if ours is not None and name != OURS:
            found["first_tokens_as_ours"] = agreement(ours.tokens, runner.tokens)
        return found


def share_of_read(found: dict[str, Any], runner: Runner) -> float:
    """Of one request: each round's rate of reading over the read test around it; the median.
    ``found``: the figures of the median round, which know how many bytes a token is."""
    gb: float = (len(runner.tokens[0]) - 1) * found["read_gb_per_s"] / found["decode_tokens_per_s"]
    rounds = zip(runner.times.first, runner.times.whole, runner.reads, strict=True)
    return statistics.median(
        gb / (whole - first) / read for first, whole, read in rounds if whole > first
    )


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The same names, another one first."""
    by %= len(names) or 1
    return [*names[by:], *names[:by]]


def _remove(path: Path) -> None:
    """What an interrupted conversion left."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
