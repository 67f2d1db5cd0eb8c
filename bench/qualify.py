"""Everything that only a GPU can prove, in one call of under 8 minutes: right, then fast.

Phases have time caps, and what a phase found is on disk before the next one begins: ceilings of
the machine; numerics of all operations; their speeds against ceilings and torch; the engine end to
end on random weights, graphs against single steps against torch; transformers on the same machine.
It also runs on a CPU, on which the figures mean less.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from s1engine.bench import kernel_speed, latency, numerics
from s1engine.bench.bare_engine import BareEngine, Job, make_decoder
from s1engine.bench.command import where
from s1engine.bench.device_time import ceilings
from s1engine.bench.kernel_speed import parse_integers
from s1engine.bench.kernel_work import KERNELS, BenchSetup
from s1engine.bench.shapes import NAMES, shape, step_bytes
from s1engine.bench.transformers_peer import peer_of
from s1engine.config import QUANTIZATIONS, EngineConfig
from s1engine.errors import RequestError
from s1engine.models.decoder import Decoder
from s1engine.models.model_config import ModelConfig
from s1engine.ops import Ops, select_ops
from s1engine.ops.compile_ahead import compiled_ahead
from s1engine.ops.torch_ops import TorchOps
from s1engine.runner.resolved_config import BLOCK_SIZES, resolve_device, resolve_dtype

EQUAL_STEPS = 32  # greedy tokens that graph, single steps and torch are compared over
PROMPT = 512


@dataclass(slots=True)
class Shared:
    """What all phases share: where to measure, what was found, and the clock."""

    device: str
    dtype: torch.dtype
    shapes: list[str]
    batches: list[int]
    contexts: list[int]
    steps: int
    quantization: str | None
    out: Path
    found: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    ends: float = 0.0  # of the present phase

    def in_time(self) -> bool:
        return time.monotonic() < self.ends

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        found = {"bench": "qualify", **self.found, "failures": self.failures, "where": where()}
        (self.out / "qualify.json").write_text(json.dumps(found, indent=1) + "\n")
        (self.out / "qualify.md").write_text(report(self.found, self.failures))

    @property
    def block_size(self) -> int:
        return BLOCK_SIZES[self.device]


def check_numerics(shared: Shared) -> dict[str, Any]:
    """All operations at the shapes of every model, smallest first."""
    ops = select_ops(shared.device)
    rows: dict[str, Any] = {}
    for name in shared.shapes:
        at = BenchSetup(shape(name), shared.dtype, shared.device)
        calls = numerics.numeric_cases(at, shared.block_size)
        if shared.device == "cuda":
            with compiled_ahead(progress=True), torch.inference_mode():
                for call in calls.values():
                    with suppress(Exception):  # it is raised again, and told, below
                        call(ops, lambda tensor: tensor)
        for case, call in calls.items():
            if not shared.in_time():
                return rows
            try:
                row = numerics.compare_with_oracle(call, ops, shared.dtype)
            except Exception as error:
                row = {"error": str(error), "torch_error": None, "repeats": False, "ok": False}
            rows[f"{name} {case}"] = row
            if not row["ok"]:
                shared.failures.append(f"numerics: {name} {case}: {row}")
    return rows


def measure_kernels(shared: Shared) -> list[dict[str, Any]]:
    """Speeds; attention first, since it decides most."""
    names = sorted(KERNELS, key=lambda name: name not in ("decode", "linear_o"))
    rows: list[dict[str, Any]] = []
    limits = shared.found["ceilings"]
    for name in shared.shapes:
        at = BenchSetup(shape(name), shared.dtype, shared.device)
        for case, batch, context in kernel_speed.cases(names, shared.batches, shared.contexts, at):
            if not shared.in_time():
                return rows
            try:
                row = kernel_speed.measure(case, at, batch, context, limits)
            except Exception as error:  # one kernel, or a baseline without memory
                what = f"{name} {case} batch {batch} context {context}"
                shared.failures.append(f"kernels: {what}: {error}")
                continue
            rows.append({"shape": name, **row})
        shared.found["kernels"] = rows
        shared.save()
    return rows


def run_engines(shared: Shared) -> dict[str, Any]:
    """Same tokens however they are computed, then how fast, for every shape that fits."""
    rows: dict[str, Any] = {}
    for name in shared.shapes:
        model = shape(name)
        if not shared.in_time():
            rows[name] = {"skipped": "no time left"}
        elif not _fits(model, shared):
            rows[name] = {"skipped": "the weights do not fit"}
        else:
            try:
                rows[name] = _run_engine(shared, model)
            except Exception:
                rows[name] = {"skipped": "failed"}
                shared.failures.append(f"engine: {name}: {traceback.format_exc()}")
            shared.found["engine"] = rows
            shared.save()
    return rows


def _fits(model: ModelConfig, shared: Shared) -> bool:
    if shared.device != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info()
    return model.num_parameters * shared.dtype.itemsize < 0.85 * free


def _config(shared: Shared, **options: Any) -> EngineConfig:
    most = max(shared.batches)
    return EngineConfig(
        device=shared.device,
        dtype=str(shared.dtype).removeprefix("torch."),
        max_num_seqs=most,
        max_num_batched_tokens=max(2048, most),
        max_model_len=PROMPT + shared.steps + 256,
        enable_prefix_caching=False,
        quantization=shared.quantization,
        **options,
    )


def _run_engine(shared: Shared, model: ModelConfig) -> dict[str, Any]:
    config = _config(shared)
    decoder = make_decoder(model, config)
    found: dict[str, Any] = {"equal": _compare(shared, model, decoder), "rows": []}
    if not found["equal"]["graph_is_eager"]:
        shared.failures.append(f"engine: graphs and single steps differ: {found['equal']}")
    for batch in shared.batches:
        if not shared.in_time():
            break
        sizes = {"batch": batch, "prompt": PROMPT, "steps": shared.steps}
        plain = latency.decode(config, model, decoder, thinks=False, **sizes)
        row = latency.decode(config, model, decoder, thinks=True, **sizes)
        nbytes = step_bytes(
            model,
            decoder.dtype.itemsize,
            batch,
            PROMPT + shared.steps // 2,
            shared.quantization,
        )
        read = shared.found["ceilings"]["read_bytes_per_s"]
        row["share_of_read"] = nbytes / read / row["step_s"]
        row["budgets_on_off"] = row["tokens_per_s"] / plain["tokens_per_s"]
        found["rows"].append({"batch": batch, **row})
    return found


def _compare(shared: Shared, model: ModelConfig, decoder: Decoder) -> dict[str, Any]:
    """Greedy tokens of a few sequences: by graphs, by single steps without, and on torch. None
    thinks: the phrases of a budget are fed one a step by the first, at once by the others, which
    is the same but for rounding."""

    def tokens(ops: Ops | None, **options: Any) -> list[list[int]]:
        config = _config(shared, **options)
        if ops is None:
            own = decoder
        elif isinstance(decoder.weights.lm_head, torch.Tensor):
            own = Decoder(model, decoder.weights, ops)
        else:  # packed for the device
            own = make_decoder(model, config, ops)
        engine = BareEngine(config, model, own)
        generator = torch.Generator().manual_seed(1)
        names = [
            engine.add(
                Job(
                    prompt=torch.randint(10, 300, (20 + 30 * i,), generator=generator).tolist(),
                    max_new=EQUAL_STEPS,
                )
            )
            for i in range(4)
        ]
        engine.run()
        return [engine.generated(name) for name in names]

    ahead = tokens(None, run_ahead=8)
    single = tokens(None, enforce_eager=True, run_ahead=1)
    plain = tokens(TorchOps(), enforce_eager=True, run_ahead=1)
    return {
        "graph_is_eager": ahead == single,
        "first_difference_to_torch": [
            next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            for a, b in zip(single, plain, strict=True)
        ],
    }


def run_transformers(shared: Shared) -> dict[str, Any]:
    """Tokens per second of transformers on the first shape, at the same batch sizes: its plain
    ``generate`` and, on CUDA, its continuous batching."""
    model = shape(shared.shapes[0])
    peer, options = peer_of(model, shared.dtype, shared.device, shared.steps)
    rows: dict[str, Any] = {}
    for batch in shared.batches:
        if not shared.in_time():
            break
        ids = torch.randint(10, model.vocab_size, (batch, PROMPT), device=shared.device)
        ways = {
            "generate": lambda ids=ids: peer.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=options
            )
        }
        if shared.device == "cuda":
            ways["generate_batch"] = lambda ids=ids: peer.generate_batch(
                ids.tolist(), generation_config=options
            )
        rows[str(batch)] = {
            name: batch * shared.steps / _seconds(way) for name, way in ways.items()
        }
    return {"shape": shared.shapes[0], "tokens_per_s": rows}


def _seconds(way: Callable[[], object]) -> float:
    begin = time.perf_counter()
    with torch.inference_mode():
        way()
    return time.perf_counter() - begin


PHASES: dict[str, tuple[float, Callable[[Shared], Any]]] = {  # share of the time, what to do
    "ceilings": (0.05, lambda shared: ceilings(shared.device)),
    "numerics": (0.15, check_numerics),
    "kernels": (0.25, measure_kernels),
    "engine": (0.40, run_engines),
    "transformers": (0.10, run_transformers),
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All phases; a phase that fails is a failure of its own and stops no other."""
    device = resolve_device(args.device)
    shared = Shared(
        device=device,
        dtype=resolve_dtype(args.dtype, device, torch.bfloat16),
        shapes=args.shapes.split(","),
        batches=parse_integers("batch", args.batch),
        contexts=parse_integers("context", args.context),
        steps=args.steps,
        out=args.out,
        quantization=args.quantization,
    )
    for name in shared.shapes:
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
        shared.ends = begin + share * 60 * args.minutes
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            shared.found[name] = phase(shared)
        except Exception:
            shared.failures.append(f"{name}: {traceback.format_exc()}")
        if device == "cuda":
            torch.cuda.empty_cache()
        took = time.monotonic() - begin
        shared.found.setdefault("seconds", {})[name] = round(took, 1)
        print(f"{name}: {took:.1f} s", file=sys.stderr, flush=True)
        shared.save()
    print((shared.out / "qualify.md").read_text(), file=sys.stderr)
    return {**shared.found, "failures": shared.failures}


def report(found: dict[str, Any], failures: list[str]) -> str:
    """The findings as Markdown."""
    return "\n".join(_sections(found, failures)) + "\n"


def _sections(found: dict[str, Any], failures: list[str]) -> Iterator[str]:
    yield "# Qualification\n"
    yield f"Failures: {len(failures)}\n"
    yield from (f"```\n{failure}\n```" for failure in failures)
    if "ceilings" in found:
        rows = [{"limit": name, "value": value} for name, value in found["ceilings"].items()]
        yield "## Ceilings\n\n" + kernel_speed.markdown_table(rows) + "\n"
    if "numerics" in found:
        rows = [{"case": case, **row} for case, row in found["numerics"].items()]
        yield "## Numerics\n\n" + kernel_speed.markdown_table(rows) + "\n"
    if "kernels" in found:
        yield "## Kernels\n\n" + kernel_speed.markdown_table(found["kernels"]) + "\n"
    for name, one in found.get("engine", {}).items():
        yield f"## Engine, {name}\n\n{one.get('skipped') or one['equal']}\n"
        yield kernel_speed.markdown_table([_rounded(row) for row in one.get("rows", [])]) + "\n"
    if "transformers" in found:
        yield f"## transformers\n\n{json.dumps(found['transformers'])}\n"


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


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
