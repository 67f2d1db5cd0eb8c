"""Tokens a second with drafts over those without, at several concurrencies, in one process.

Two engines take steps in turns, so that both see the same machine load. The bundled model answers
arithmetic questions. Other shapes have random weights, so their sampled tokens are replaced by
those of real traces: a step costs what the shape costs, and drafts are accepted as on these traces.
With --kinds the traces are random tokens of few kinds: many drafts, nearly all of them wrong.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from s1engine.bench.bare_engine import BareEngine, Job, make_decoder
from s1engine.bench.shapes import NAMES, shape
from s1engine.bench.studies.draft_acceptance import read_traces
from s1engine.config import EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.errors import RequestError
from s1engine.eval.tasks import arithmetic_questions
from s1engine.models.model_config import ModelConfig
from s1engine.options import Prompt
from s1engine.outputs import RequestOutput
from s1engine.runner.interface import ModelRunnerOutput, NewRequest, SchedulerOutput
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from s1engine.tokenizer import Tokenizer

SMALL: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_layers": 8,
    "num_heads": 8,
}

Workload = Callable[[], Iterator[int]]  # runs it; yields the new tokens after each step


@dataclass(slots=True)
class TraceEngine(BareEngine):
    """Replaces sampled tokens by those of ``traces``, one for each job, prompt included."""

    traces: list[np.ndarray] = field(default_factory=list)
    _job_ids: dict[int, int] = field(default_factory=dict)  # by req_index

    def _admit(self, job_id: int) -> NewRequest:
        request = BareEngine._admit(self, job_id)
        self._job_ids[request.req_index] = job_id
        return request

    def _execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        output, rows = self.runner.execute(step), self.runner.batch.inputs().rows
        positions = zip(rows.req_indices.tolist(), rows.positions.tolist(), strict=True)
        tokens = [self.traces[self._job_ids[req_index]][at] for req_index, at in positions]
        return replace(output, token_ids=np.array(tokens, np.int64))


def chat_work(engine: LLMEngine, batch: int, temperature: float) -> Workload:
    """Arithmetic questions, each with three waits."""
    budget = ThinkingBudget(num_waits=3)
    params = SamplingParams(temperature=temperature, seed=0, thinking=budget)
    questions = arithmetic_questions(0, batch)
    return generate_work(
        engine, [[{"role": "user", "content": q.prompt}] for q in questions], params
    )


def generate_work(engine: LLMEngine, prompts: Sequence[Prompt], params: SamplingParams) -> Workload:
    """All prompts at once."""

    def work() -> Iterator[int]:
        for prompt in prompts:
            engine.add_request(engine.make_request(prompt, params))
        while engine.has_unfinished:
            outputs = [event for _, event in engine.step()]
            yield sum(len(o.outputs[0].token_ids) for o in outputs if isinstance(o, RequestOutput))

    return work


def replay_work(
    config: EngineConfig, model: ModelConfig, decoder: Any, traces: list[np.ndarray], context: int
) -> Workload:
    """Continues the traces after their first ``context`` tokens; later rounds find those in the
    prefix cache."""
    engine = TraceEngine(config, model, decoder, traces=[])

    def work() -> Iterator[int]:
        engine.traces += traces
        for trace in traces:
            engine.add(Job(prompt=trace[:context].tolist(), max_new=len(trace) - context))
        before = engine.scheduler.stats().num_sampled_tokens
        while engine.scheduler.has_unfinished():
            engine.step()
            now = engine.scheduler.stats().num_sampled_tokens
            yield now - before
            before = now

    return work


@dataclass(slots=True)
class Contender:
    """One of the two engines in one round."""

    running: Iterator[int]
    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0

    def step(self) -> bool:
        """Take one step; False if the workload has ended."""
        begin = time.perf_counter()
        gained = next(self.running, None)
        self.seconds += time.perf_counter() - begin
        self.tokens += gained or 0
        self.steps += gained is not None
        return gained is not None


def compare(plain: Workload, drafting: Workload, rounds: int) -> dict[str, Any]:
    """Rates of both; the ratio is the median of the rounds' ratios."""
    rates: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        sides = Contender(plain()), Contender(drafting())
        running = list(sides)
        while running:
            running = [side for side in running if side.step()]
        for side, own_rates in zip(sides, rates, strict=True):
            if turn:  # the first warms up
                own_rates.append(side.tokens / side.seconds)
    ratios = [fast / slow for slow, fast in zip(*rates, strict=True)]
    return {
        "tokens_per_s": round(statistics.median(rates[0]), 1),
        "drafting_tokens_per_s": round(statistics.median(rates[1]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        "steps": [side.steps for side in sides],
    }


def bundled(args: argparse.Namespace, batches: list[int]) -> dict[str, Any]:
    """The bundled model, greedy and sampled."""
    options: dict[str, Any] = {"max_num_seqs": max(batches)}
    engines = [
        LLMEngine(EngineConfig(**options, num_speculative_tokens=n)) for n in (0, args.draft)
    ]
    rows: dict[str, Any] = {}
    for temperature in (0.0, 0.8):
        for batch in batches:
            works = [chat_work(engine, batch, temperature) for engine in engines]
            name = f"temperature {temperature}, batch {batch}"
            rows[name] = compare(works[0], works[1], args.rounds)
            print(f"s1-nano, {name}: {rows[name]}", file=sys.stderr)
    return rows


def replayed(args: argparse.Namespace, batches: list[int]) -> dict[str, Any]:
    """Traces at another shape, a different one for every sequence."""
    model = shape("0.5B" if args.shape == "small" else args.shape)
    model = replace(model, **SMALL) if args.shape == "small" else model
    length = args.context + args.tokens
    traces = traces_of(args, length, max(batches), model.vocab_size)
    options: dict[str, Any] = {"max_num_seqs": max(batches), "max_model_len": length + 1}
    configs = [EngineConfig(**options, num_speculative_tokens=n) for n in (0, args.draft)]
    decoder = make_decoder(model, configs[0])
    rows: dict[str, Any] = {"context": args.context, "tokens": args.tokens}
    for batch in batches:
        works = [
            replay_work(config, model, decoder, traces[:batch], args.context) for config in configs
        ]
        rows[f"batch {batch}"] = compare(works[0], works[1], args.rounds)
        print(f"{args.shape}, batch {batch}: {rows[f'batch {batch}']}", file=sys.stderr)
    return rows


def traces_of(args: argparse.Namespace, length: int, count: int, vocab: int) -> list[np.ndarray]:
    """``count`` traces of ``length`` tokens, [length] int32 each; fewer if the file has fewer."""
    if args.kinds:
        rng = np.random.default_rng(0)
        kinds = rng.choice(vocab, args.kinds, replace=False)
        return list(rng.choice(kinds, (count, length)).astype(np.int32))
    traces = read_traces(args.traces, Tokenizer.from_dir(args.tokenizer), 1)
    heads = [trace.tokens[:length] for trace in traces if len(trace.tokens) >= length][:count]
    if max(map(max, heads)) >= vocab:
        raise RequestError(f"--traces: token ids must be below {vocab}, the vocabulary of --shape")
    return heads


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The bundled model; with --traces or --kinds, traces at another shape."""
    batches = [int(text) for text in args.batch.split(",")]
    result: dict[str, Any] = {"draft": args.draft}
    if args.traces is None and not args.kinds:
        result["s1-nano"] = bundled(args, batches)
    else:
        result[args.shape] = replayed(args, batches)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    parser.add_argument("--draft", type=int, default=8, help="num_speculative_tokens")
    parser.add_argument("--batch", default="1,4,16,64", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--traces", type=Path, help="replay these, as draft_acceptance")
    parser.add_argument("--tokenizer", type=Path, help="directory of the traces' tokenizer")
    parser.add_argument(
        "--kinds", type=int, default=0, metavar="N", help="random tokens of N kinds"
    )
    parser.add_argument("--shape", choices=("small", *NAMES), default="small")
    parser.add_argument("--context", type=int, default=768, help="trace tokens before decoding")
    parser.add_argument("--tokens", type=int, default=128, help="trace tokens to decode")
