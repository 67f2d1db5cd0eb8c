"""Correctness and speed on a GPU, in one call of under 8 minutes.

Phases have time limits, and each saves its results before the next one begins: the machine's
limits; numerics of all operations; their speed against these limits and torch; the engine on random
weights, graphs against single steps against torch; transformers on the same machine. It also runs
on a CPU, where the figures mean less.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from s1engine.bench import kernel_speed, latency, numerics
from s1engine.bench.bare_engine import BareEngine, Job, make_decoder
from s1engine.bench.device_time import ceilings
from s1engine.bench.kernel_speed import parse_integers
from s1engine.bench.kernel_work import KERNELS, BenchSetup
from s1engine.bench.qualify_report import report
from s1engine.bench.result import where, write_result
from s1engine.bench.shapes import NAMES, shape, step_bytes
from s1engine.bench.transformers_peer import transformers_model
from s1engine.config import QUANTIZATIONS, EngineConfig
from s1engine.errors import RequestError
from s1engine.models.decoder import Decoder
from s1engine.models.model_config import ModelConfig
from s1engine.ops import select_ops
from s1engine.ops.compile_ahead import compiled_ahead
from s1engine.ops.torch_ops import TorchOps
from s1engine.runner.resolved_config import BLOCK_SIZES, resolve_device, resolve_dtype

EQUAL_STEPS = 32  # greedy tokens compared between graphs, single steps and torch
PROMPT = 512
CHUNK = 512  # tokens of a prompt in each mixed step
SAMPLING_NAMES = ["greedy", "recommended", "penalties", "logprobs"]
MAX_LONG_CHUNK = 2048  # a third of a long prompt


@dataclass(slots=True)
class Qualification:
    """Options, results and time limit, shared by all phases."""

    device: str
    dtype: torch.dtype
    shapes: list[str]
    batches: list[int]
    contexts: list[int]
    steps: int
    quantization: str | None
    out: Path
    results: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    deadline: float = 0.0  # of the current phase

    def in_time(self) -> bool:
        return time.monotonic() < self.deadline

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        results = {"bench": "qualify", **self.results, "failures": self.failures}
        write_result(self.out / "qualify.json", {**results, "where": where()})
        (self.out / "qualify.md").write_text(report(self.results, self.failures))

    @property
    def block_size(self) -> int:
        return BLOCK_SIZES[self.device]


def check_numerics(run: Qualification) -> dict[str, Any]:
    """Check all operations at the shapes of every model, the smallest first."""
    ops = select_ops(run.device)
    rows: dict[str, Any] = {}
    for name in run.shapes:
        at = BenchSetup(shape(name), run.dtype, run.device)
        calls = numerics.numeric_cases(at, run.block_size)
        if run.device == "cuda":
            with compiled_ahead(progress=True), torch.inference_mode():
                for call in calls.values():
                    with suppress(Exception):  # raised again and reported below
                        call(ops, lambda tensor: tensor)
        for case, call in calls.items():
            if not run.in_time():
                return rows
            try:
                row = numerics.compare_with_oracle(call, ops, run.dtype)
            except Exception as error:
                row = {"error": str(error), "torch_error": None, "repeats": False, "ok": False}
            rows[f"{name} {case}"] = row
            if not row["ok"]:
                run.failures.append(f"numerics: {name} {case}: {row}")
    return rows


def measure_kernels(run: Qualification) -> list[dict[str, Any]]:
    """Measure all operations, attention first: it matters most."""
    names = sorted(KERNELS, key=lambda name: name not in ("decode", "linear_o"))
    rows: list[dict[str, Any]] = []
    limits = run.results["ceilings"]
    for name in run.shapes:
        at = BenchSetup(shape(name), run.dtype, run.device)
        for case, batch, context in kernel_speed.cases(names, run.batches, run.contexts, at):
            if not run.in_time():
                return rows
            try:
                row = kernel_speed.measure(case, at, batch, context, limits)
            except Exception as error:  # a kernel fails, or the baseline runs out of memory
                row_name = f"{name} {case} batch {batch} context {context}"
                run.failures.append(f"kernels: {row_name}: {error}")
                continue
            rows.append({"shape": name, **row})
        run.results["kernels"] = rows
        run.save()
    return rows


def run_engines(run: Qualification) -> dict[str, Any]:
    """Compare tokens between ways of computing them, then measure speed, for every shape that
    fits."""
    rows: dict[str, Any] = {}
    for name in run.shapes:
        model = shape(name)
        if not run.in_time():
            rows[name] = {"skipped": "no time left"}
        elif not _fits(model, run):
            rows[name] = {"skipped": "the weights do not fit"}
        else:
            try:
                rows[name] = _run_engine(run, model)
            except Exception:
                rows[name] = {"skipped": "failed"}
                run.failures.append(f"engine: {name}: {traceback.format_exc()}")
            run.results["engine"] = rows
            run.save()
    return rows


def _fits(model: ModelConfig, run: Qualification) -> bool:
    if run.device != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info()
    return model.num_parameters * run.dtype.itemsize < 0.85 * free


def _config(run: Qualification, **options: Any) -> EngineConfig:
    most = max(run.batches) + 1  # mixed steps have a row more
    names: dict[str, Any] = {
        "device": run.device,
        "dtype": str(run.dtype).removeprefix("torch."),
        "quantization": run.quantization,
        "max_num_seqs": most,
        "max_num_batched_tokens": max(2048, most),
        "max_model_len": max(PROMPT + run.steps + 256, CHUNK),
        "enable_prefix_caching": False,
        "max_step_ms": 0,
    }
    return EngineConfig(**{**names, **options})


def _run_engine(run: Qualification, model: ModelConfig) -> dict[str, Any]:
    config = _config(run)
    decoder = make_decoder(model, config)
    results: dict[str, Any] = {"equal": _compare(run, model, decoder), "rows": [], "mixed": []}
    for name in ("graph_is_eager", "three_chunks_are_one"):
        if not results["equal"][name]:
            run.failures.append(f"engine: {name} is false: {results['equal']}")
    engine = BareEngine(config, model, decoder)
    read = run.results["ceilings"]["read_bytes_per_s"]
    for batch in run.batches:
        context = PROMPT + run.steps // 2
        itemsize = decoder.dtype.itemsize
        nbytes = step_bytes(model, itemsize, batch, context, run.quantization)
        if run.in_time():
            for row in latency.decode_all(engine, batch, PROMPT, run.steps, SAMPLING_NAMES):
                row["share_of_read"] = nbytes / read / row["step_s"]
                results["rows"].append(row)
    del engine
    for batch in run.batches:
        if run.in_time():
            options = {"max_num_seqs": batch + 1, "max_num_batched_tokens": batch + CHUNK}
            mixed = BareEngine(_config(run, **options), model, decoder)
            results["mixed"].append(latency.decode_mixed(mixed, batch, PROMPT, run.steps, CHUNK))
            del mixed
    return results


def _compare(run: Qualification, model: ModelConfig, decoder: Decoder) -> dict[str, Any]:
    """Greedy tokens of a few sequences by graphs, by single steps and on torch, and those after a
    long prompt in three chunks and in one. No sequence has a budget: graphs feed a forced phrase
    one token a step and the others at once, which differs in rounding."""
    generator = torch.Generator().manual_seed(1)

    def prompt(length: int) -> list[int]:
        return torch.randint(10, 300, (length,), generator=generator).tolist()

    short = [prompt(20 + 30 * i) for i in range(4)]
    third = min(MAX_LONG_CHUNK, model.max_position_embeddings // 4)
    long = [prompt(3 * third)]
    graphs = _tokens(run, model, decoder, short, run_ahead=8)
    single = _tokens(run, model, decoder, short, enforce_eager=True, run_ahead=1)
    room = 3 * third + EQUAL_STEPS
    seqs = {"max_num_seqs": 1, "max_model_len": room}
    chunked, whole = (
        _tokens(run, model, decoder, long, max_num_batched_tokens=tokens, **seqs)
        for tokens in (third, room)
    )
    result: dict[str, Any] = {
        "graph_is_eager": graphs == single,
        "three_chunks_are_one": chunked == whole,
    }
    if not run.in_time():
        return result
    own = TorchOps()
    if isinstance(decoder.weights.lm_head, torch.Tensor):
        oracle = Decoder(model, decoder.weights, own)
    else:  # packed for the device
        oracle = make_decoder(model, _config(run), own)
    plain = _tokens(run, model, oracle, short, enforce_eager=True, run_ahead=1)
    result["first_difference_to_torch"] = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        for a, b in zip(single, plain, strict=True)
    ]
    return result


def _tokens(
    run: Qualification, model: ModelConfig, decoder: Decoder, prompts: list[list[int]],
    **options: Any,
) -> list[list[int]]:  # fmt: skip
    """The first EQUAL_STEPS greedy tokens after each prompt."""
    engine = BareEngine(_config(run, **options), model, decoder)
    job_ids = [engine.add(Job(prompt=prompt, max_new=EQUAL_STEPS)) for prompt in prompts]
    engine.run_jobs()
    return [engine.output_tokens(job_id) for job_id in job_ids]


def run_transformers(run: Qualification) -> dict[str, Any]:
    """Tokens per second of transformers on the first shape, at the same batch sizes: ``generate``
    and, on CUDA, continuous batching."""
    model = shape(run.shapes[0])
    peer, options = transformers_model(model, run.dtype, run.device, run.steps)
    rows: dict[str, Any] = {}
    for batch in run.batches:
        if not run.in_time():
            break
        ids = torch.randint(10, model.vocab_size, (batch, PROMPT), device=run.device)
        variants = {
            "generate": lambda ids=ids: peer.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=options
            )
        }
        if run.device == "cuda":
            variants["generate_batch"] = lambda ids=ids: peer.generate_batch(
                ids.tolist(), generation_config=options
            )
        rows[str(batch)] = {
            name: batch * run.steps / _seconds(generate) for name, generate in variants.items()
        }
    return {"shape": run.shapes[0], "tokens_per_s": rows}


def _seconds(generate: Callable[[], object]) -> float:
    begin = time.perf_counter()
    with torch.inference_mode():
        generate()
    return time.perf_counter() - begin


PHASES: dict[str, tuple[float, Callable[[Qualification], Any]]] = {  # share of the time, function
    "ceilings": (0.05, lambda run: ceilings(run.device)),
    "numerics": (0.15, check_numerics),
    "kernels": (0.25, measure_kernels),
    "engine": (0.40, run_engines),
    "transformers": (0.10, run_transformers),
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen phases; a phase that fails is reported and stops no other."""
    device = resolve_device(args.device)
    qualification = Qualification(
        device=device,
        dtype=resolve_dtype(args.dtype, device, torch.bfloat16),
        shapes=args.shapes.split(","),
        batches=parse_integers("batch", args.batch),
        contexts=parse_integers("context", args.context),
        steps=args.steps,
        out=args.out,
        quantization=args.quantization,
    )
    for name in qualification.shapes:
        if name not in NAMES:
            raise RequestError(f"shapes: {name!r} is none of {', '.join(NAMES)}", param="shapes")
    phases = args.phases.split(",")
    for name in phases:
        if name not in PHASES:
            raise RequestError(f"phases: {name!r} is none of {', '.join(PHASES)}", param="phases")
        if name in ("kernels", "engine") and "ceilings" not in phases:
            raise RequestError(f"phases: {name} needs ceilings too", param="phases")
    for name, (share, phase) in PHASES.items():
        if name not in phases:
            continue
        begin = time.monotonic()
        qualification.deadline = begin + share * 60 * args.minutes
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            qualification.results[name] = phase(qualification)
        except Exception:
            qualification.failures.append(f"{name}: {traceback.format_exc()}")
        if device == "cuda":
            torch.cuda.empty_cache()
        seconds = time.monotonic() - begin
        qualification.results.setdefault("seconds", {})[name] = round(seconds, 1)
        print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)
        qualification.save()
    print((qualification.out / "qualify.md").read_text(), file=sys.stderr)
    return {**qualification.results, "failures": qualification.failures}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench qualify``."""
    parser.add_argument("--shapes", default="0.5B,7B,32B", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--batch", default="1,8,64", help="sequences at once, comma-separated")
    parser.add_argument("--context", default="1024,8192", help="cached tokens of attention")
    parser.add_argument("--steps", type=int, default=256, help="decode steps to time")
    parser.add_argument(
        "--phases",
        default=",".join(PHASES),
        help="comma-separated",
    )
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="of the engine phase; default: none"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("qualification"), help="folder")
