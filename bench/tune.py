"""Time other launches than those of ``kernels/launch_table.py`` in a decode step on a GPU.

A few layers and the head of a random model run as one graph, because kernels overlap and the gain
of one may be the loss of the next. Kernel by kernel, the fastest launch is kept for the following
ones. The table does not change by itself: edit it where a difference is clear.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from s1engine.bench.bare_engine import make_decoder
from s1engine.bench.device_time import ceilings, seconds
from s1engine.bench.kernel_speed import markdown_table, parse_integers
from s1engine.bench.shapes import NAMES, shape, step_bytes
from s1engine.config import QUANTIZATIONS, EngineConfig
from s1engine.errors import RequestError
from s1engine.models.decoder import Decoder
from s1engine.ops import AttentionMetadata
from s1engine.ops.compile_ahead import compiled_ahead
from s1engine.runner.kv_cache import KVCache
from s1engine.runner.resolved_config import BLOCK_SIZES

if TYPE_CHECKING:  # needs Triton, which may be missing without a GPU
    from s1engine.bench.launches import LaunchCandidate

STEPS, ROUNDS = 8, 5  # in a graph; number of timings


@dataclass(frozen=True, slots=True)
class TunedStep:
    """A decode step of ``batch`` sequences, each of ``context`` tokens."""

    decoder: Decoder
    batch: int
    context: int
    caches: KVCache
    ids: Tensor
    meta: AttentionMetadata
    columns: tuple[Tensor, Tensor, Tensor]  # temperature, seeds, positions

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Hidden states [batch, H] and sampled ids [batch]."""
        from s1engine.kernels.norm_head_sample import norm_head_sample

        weights, eps = self.decoder.weights, self.decoder.config.rms_norm_eps
        hidden = self.decoder.forward(self.ids, self.caches.layers, self.meta)
        assert isinstance(weights.lm_head, Tensor)
        ids = norm_head_sample(hidden, weights.norm, eps, weights.lm_head, *self.columns)
        return hidden, ids


def make_step(decoder: Decoder, batch: int, context: int) -> TunedStep:
    """A decode step over shuffled blocks."""
    device, block = str(decoder.device), BLOCK_SIZES[decoder.device.type]
    per_row = -(-context // block)
    order = torch.randperm(batch * per_row, device=device).view(batch, per_row)
    last = torch.full((batch,), context - 1, dtype=torch.int32, device=device)
    meta = AttentionMetadata(
        positions=last,
        slot_mapping=order[:, -1] * block + (context - 1) % block,
        cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device=device),
        context_lens=last + 1,
        block_table=order.to(torch.int32),
        max_seqlen_q=1,
    )
    caches = KVCache(
        decoder.config, num_blocks=order.numel(), block_size=block, dtype=decoder.dtype,
        device=device,
    )  # fmt: skip
    for k, v in caches.layers:
        k.normal_()
        v.normal_()
    rows = torch.arange(batch, device=device)
    columns = torch.ones(batch, device=device), rows, rows + context
    return TunedStep(decoder, batch, context, caches, rows.to(torch.int32), meta, columns)


def descend(step: TunedStep, limit: float) -> list[dict[str, Any]]:
    """Time every candidate of every kernel, with the best candidates of the kernels before it."""
    from s1engine.bench.launches import KERNELS, LaunchCandidate, launch_candidates

    model = step.decoder.config
    best: dict[str, LaunchCandidate] = {}
    rows = []
    for kernel in KERNELS:
        times: dict[str, float] = {}
        candidates = {
            candidate.name: candidate
            for candidate in launch_candidates(kernel, step.batch, model.num_kv_heads)
        }
        for name, candidate in candidates.items():
            step_s = _time(step, [*best.values(), candidate])
            if step_s is not None:
                times[name] = step_s
        fastest = min(times, key=lambda name: times[name])
        best[kernel] = candidates[fastest]
        rows += [
            {
                "batch": step.batch, "context": step.context, "kernel": kernel, "choice": name,
                "step_us": round(1e6 * step_s, 2), "share_of_read": round(limit / step_s, 3),
                "chosen": name == fastest,
            }
            for name, step_s in times.items()
        ]  # fmt: skip
    return rows


def _time(step: TunedStep, chosen: "list[LaunchCandidate]") -> float | None:
    """Seconds of a step; None if a candidate cannot be launched, e.g. for lack of shared memory."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    from s1engine.bench.launches import use_launches

    try:
        with use_launches(chosen, step.decoder.config), torch.inference_mode():
            return seconds([step], "cuda", ROUNDS, STEPS)
    except (CompilationError, OutOfResources, PTXASError):
        return None


def compile_all(steps: list[TunedStep], *, progress: bool) -> None:
    """Compile all candidates of all steps, on all cores."""
    from s1engine.bench.launches import KERNELS, launch_candidates, use_launches

    with compiled_ahead(progress=progress), torch.inference_mode():
        for step in steps:
            model = step.decoder.config
            for kernel in KERNELS:
                for choice in launch_candidates(kernel, step.batch, model.num_kv_heads):
                    with use_launches([choice], model):
                        step()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Tune every batch size; the table's and the fastest launches go to stderr."""
    if not torch.cuda.is_available():
        raise RequestError("bench tune needs a CUDA device", param="device")
    model = replace(shape(args.shape), num_layers=args.layers, layer_windows=(0,) * args.layers)
    config = EngineConfig(device="cuda", dtype="bfloat16", quantization=args.quantization)
    decoder = make_decoder(model, config)
    steps = [
        make_step(decoder, batch, args.context) for batch in parse_integers("batch", args.batch)
    ]
    compile_all(steps, progress=True)
    limits = ceilings("cuda")
    rows: list[dict[str, Any]] = []
    for step in tqdm(steps, unit="batch"):
        nbytes = step_bytes(model, 2, step.batch, step.context, args.quantization)
        new = descend(step, nbytes / limits["read_bytes_per_s"])
        shown = [row for row in new if row["chosen"] or row["choice"] == "table"]
        print(markdown_table(shown), file=sys.stderr)
        rows += new
    return {
        "shape": args.shape,
        "layers": args.layers,
        "quantization": args.quantization,
        "ceilings": limits,
        "rows": rows,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench tune``."""
    parser.add_argument("--shape", default="7B", choices=NAMES, help="Qwen2.5 of that size")
    parser.add_argument("--layers", type=int, default=4, help="of the model that is timed")
    parser.add_argument("--batch", default="1,4,16,64", help="sequences, comma-separated")
    parser.add_argument("--context", type=int, default=1024, help="cached tokens of each")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="default: none")
