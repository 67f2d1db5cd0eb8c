"""Weights in few bits against those of the checkpoint: error on real traces, and memory.

The traces are the model's own answers to the arithmetic task, in float32. Error is taken with every
token given (teacher-forced), as in ``bench kv-cache``: KL(full || few bits) of the next token's
distribution, and how often the likeliest token is the same one. What the device adds to the format
itself, the rounding of activations to 8 bits, is told apart by the definition (``torch_ops``).
fp8 is a format for CUDA: here the definition runs, and torch's scaled product of ``fp8_linear``.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s1engine.bench.studies.quantized_kv_cache import difference, forced_logits, traces_of
from s1engine.config import BUNDLED_MODEL
from s1engine.engine.llm import LLM
from s1engine.models.loader import load_decoder, resolve_model
from s1engine.models.model_config import ModelConfig
from s1engine.ops import Matrix, Ops
from s1engine.ops.cpu_ops import CpuOps
from s1engine.ops.fp8_linear import fp8_linear
from s1engine.ops.quantization import FP8, QuantizedMatrix
from s1engine.ops.torch_ops import TorchOps
from s1engine.runner.memory import weight_bytes

FORMATS = ("int8", "int4")


class _ScaledProducts(TorchOps):
    """fp8 as CUDA multiplies it in steps of many tokens, whose inputs are rounded as well."""

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, QuantizedMatrix):
            return fp8_linear(x, weight, bias)
        return super().linear(x, weight, bias)


def errors(model: str, count: int) -> dict[str, Any]:
    """By format, against the same model in bfloat16; what bfloat16 itself costs stands beside."""
    path = resolve_model(model)
    facts = ModelConfig.from_dir(path)
    traces = traces_of(LLM(model, progress=False, dtype="float32"), count)

    def logits(ops: Ops, dtype: torch.dtype, quantization: str | None = None) -> Tensor:
        decoder = load_decoder(path, facts, dtype, "cpu", ops, quantization=quantization)
        found = [forced_logits(decoder, [*p, *out], dtype)[len(p) - 1 :] for p, out in traces]
        return torch.cat(found)

    exact, full = logits(CpuOps(), torch.float32), logits(CpuOps(), torch.bfloat16)
    rows = {"bfloat16 against float32": difference(exact, full)}
    for fmt in FORMATS:
        rows[fmt] = difference(full, logits(CpuOps(), torch.bfloat16, fmt))
        rows[f"{fmt}, format alone"] = difference(full, logits(TorchOps(), torch.bfloat16, fmt))
    rows[FP8] = difference(full, logits(_ScaledProducts(), torch.bfloat16, FP8))
    rows[f"{FP8}, format alone"] = difference(full, logits(TorchOps(), torch.bfloat16, FP8))
    return {
        "traces": count,
        "tokens": sum(len(out) for _, out in traces),
        "rows": rows,
        "weight_bytes": {
            str(fmt or "bfloat16"): weight_bytes(facts, torch.bfloat16, fmt)
            for fmt in (None, *FORMATS, FP8)
        },
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The errors of all formats."""
    return {"model": Path(args.model).name, **errors(args.model, args.traces)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench quantization``."""
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="default: bundled s1-nano")
    parser.add_argument("--traces", type=int, default=64)
