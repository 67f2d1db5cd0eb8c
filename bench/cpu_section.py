"""Engines side by side in one case: started one by one, then run in turns, the others stopped.

Owns the order of measurements; an engine that fails does not stop the others. Knows neither where
environments come from nor what happens to the rows.
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
from typing import Any, TypeVar

import torch

from s1engine.bench.cpu_adapter import EngineSetup
from s1engine.bench.cpu_cases import CpuCase, RoundTimes, agreement, figures, headline
from s1engine.bench.cpu_engines import ADAPTERS, EngineError, EngineProcess
from s1engine.bench.random_checkpoint import random_checkpoint
from s1engine.models.model_config import ModelConfig

T = TypeVar("T")

OURS = "s1engine"
READ_BYTES = 2**30  # far more than any cache


class ReadTest:
    """Memory bandwidth: a sum over memory larger than any cache, on huge pages like the weights.

    The bandwidth of a shared machine changes from second to second, so a figure is comparable only
    with a read test of the same moment.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        area = mmap.mmap(-1, READ_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            area.madvise(mmap.MADV_HUGEPAGE)
        self._data = torch.frombuffer(area, dtype=torch.int64)
        self._data.fill_(1)  # untouched pages all map to one zero page

    def gb_per_s(self, rounds: int = 3) -> float:
        """Bandwidth of the median round."""
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
class SectionOptions:
    """Options that all sections of one call share."""

    engines: dict[str, Path]  # environments, in starting order
    work: Path  # models, conversions and logs
    threads: int
    rounds: int
    limit_s: float
    split: bool  # also measure the time to the first tokens


@dataclass(slots=True)
class MeasuredEngine:
    """A started engine and its measurements."""

    process: EngineProcess
    about: dict[str, Any]
    times: RoundTimes = field(default_factory=RoundTimes)
    tokens: list[list[int]] = field(default_factory=list)  # of all full runs
    reads: list[float] = field(default_factory=list)  # GB/s of the read test, around each round

    def generate(self, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        """Seconds and ids. Raises EngineError unless every prompt has ``new`` ids."""
        answer = self.process.run_job("generate", prompts=prompts, new=new)
        lengths = [len(ids) for ids in answer["ids"]]
        if lengths != [new] * len(prompts):
            raise EngineError(f"generated {lengths} tokens, not {new} for each prompt")
        return answer["seconds"], answer["ids"]

    def run_round(self, prompts: list[list[int]], new: int, split: bool, read: ReadTest) -> None:
        """Measure one round between two read tests."""
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

    options: SectionOptions
    shape: str
    model: ModelConfig
    precision: str
    case_name: str
    case: CpuCase
    failures: list[str] = field(default_factory=list)

    def run(self) -> list[dict[str, Any]]:
        """A row for each engine that completed; ``failures`` holds the errors of the others."""
        begin = time.perf_counter()
        with ExitStack() as stack:
            engines: dict[str, MeasuredEngine] = {}
            for name in self.options.engines:
                with self._isolated(name, engines):
                    engines[name] = self._start(name, stack)
            self._run_rounds(engines, begin)
            rows = []
            for name, engine in list(engines.items()):
                with self._isolated(name, engines):
                    rows.append(self._row(name, engine, engines.get(OURS)))
        ours = next((headline(row) for row in rows if row["engine"] == OURS), None)
        for row in rows:
            own = headline(row)
            row["ours_to_it"] = round(ours / own, 3) if ours and own else None
        return rows

    @contextmanager
    def _isolated(self, name: str, engines: dict[str, MeasuredEngine]) -> Iterator[None]:
        """Remove the engine from this section if it fails."""
        try:
            yield
        except EngineError as error:
            engines.pop(name, None)
            self.failures.append(f"{self} {name}: {error}")
            print(self.failures[-1], file=sys.stderr)

    def __str__(self) -> str:
        return f"{self.shape} {self.precision} {self.case_name}"

    def _start(self, name: str, stack: ExitStack) -> MeasuredEngine:
        target = self.converted(name)
        process = stack.enter_context(self._process(name))
        setup = EngineSetup(
            precision=self.precision,
            threads=self.options.threads,
            max_seqs=len(self.case.lengths),
            max_len=self.case.max_len,
            kv_tokens=self.case.total_len,
            kv_token_bytes=self.model.kv_bytes_per_token(torch.bfloat16),
        )
        about = process.run_job("load", target=str(target), setup=asdict(setup))
        about["start_s"] = time.perf_counter() - process.start_time
        print(f"{self} {name}: started in {about['start_s']:.1f} s", file=sys.stderr)
        warm = self.case.prompts(self.model.vocab_size, seed=-1)[:4]
        process.run_job("generate", prompts=warm, new=min(self.case.new, 8))
        return MeasuredEngine(process, about)

    def converted(self, name: str) -> Path:
        """The files that the engine loads: converted once, by a separate process, and kept."""
        source = random_checkpoint(self.model, self.shape, self.options.work)
        target = self.options.work / f"{self.shape}-{self.precision}-{name}"
        done = target.with_name(target.name + ".done")
        if not done.exists():
            _remove(target)
            with self._process(name) as process:
                process.run_job(
                    "convert", source=str(source), target=str(target), precision=self.precision
                )
            done.touch()
        return target

    @contextmanager
    def _process(self, name: str) -> Iterator[EngineProcess]:
        work = self.options.work
        log, cache = work / f"{name}.log", work / "cache"
        folder, threads = self.options.engines[name], self.options.threads
        process = EngineProcess((ADAPTERS[name],), folder, threads, log, cache)
        try:
            yield process
        finally:
            process.close()

    def _run_rounds(self, engines: dict[str, MeasuredEngine], begin: float) -> None:
        """Run rounds; in each, every engine runs once, and a different one is first. A round starts
        only if, at the length of the longest so far, it ends before the limit."""
        longest, read = 0.0, ReadTest(self.options.threads)
        for number in range(self.options.rounds):
            started = time.perf_counter()
            if number and started + longest > begin + self.options.limit_s:
                return
            prompts = self.case.prompts(self.model.vocab_size, seed=number)
            for name in rotated(list(engines), number):
                with self._isolated(name, engines):
                    engines[name].run_round(prompts, self.case.new, self.options.split, read)
            longest = max(longest, time.perf_counter() - started)

    def _row(
        self, name: str, engine: MeasuredEngine, ours: MeasuredEngine | None
    ) -> dict[str, Any]:
        row = {
            "shape": self.shape,
            "precision": self.precision,
            "case": self.case_name,
            "engine": name,
            "version": engine.about["version"],
            "prompt_tokens": sum(self.case.lengths),
            "new_tokens": self.case.new * len(self.case.lengths),
            **figures(self.case, engine.times, self.model, self.precision),
            "peak_mib": round(engine.process.peak_mib()),
            **{key: round(engine.about[key], 3) for key in ("start_s", "load_s", "first_token_s")},
        }
        row["read_test_gb_per_s"] = round(statistics.median(engine.reads), 2)
        if "read_gb_per_s" in row:
            row["share_of_read"] = round(share_of_read(row, engine), 3)
        if ours is not None and name != OURS:
            row["first_tokens_as_ours"] = agreement(ours.tokens, engine.tokens)
        return row


def share_of_read(row: dict[str, Any], engine: MeasuredEngine) -> float:
    """Read rate of one request over the read test around it, median of rounds. ``row``: the rates
    of the median round, whose ratio is the bytes per token."""
    gb: float = (len(engine.tokens[0]) - 1) * row["read_gb_per_s"] / row["decode_tokens_per_s"]
    rounds = zip(engine.times.first, engine.times.whole, engine.reads, strict=True)
    return statistics.median(
        gb / (whole - first) / read for first, whole, read in rounds if whole > first
    )


def rotated(names: Sequence[T], by: int) -> list[T]:
    """The same items, starting at ``by`` (modulo their number)."""
    by %= len(names) or 1
    return [*names[by:], *names[:by]]


def _remove(path: Path) -> None:
    """Remove the output of an interrupted conversion."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
