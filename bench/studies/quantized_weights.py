"""Quantised weights against the checkpoint's: error on real traces, and memory.

The traces are the model's answers to the arithmetic task, in float32. Errors are teacher-forced, as
in ``quantized_kv_cache``: KL(full || quantised) of the next-token distribution, and how often the
most likely token agrees. "format alone" runs the definition (``torch_ops``), without the device's
rounding of activations to 8 bits. fp8 is a CUDA format: here its definition runs, and the scaled
product of ``fp8_linear``.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s1engine.bench.studies.quantized_kv_cache import difference, forced_logits, traces_of
from s1engine.config import BUNDLED_MODEL
from s1engine.engine.llm import LLM
from s1engine.models.loader import load_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.models.model_path import resolve_model
from s1engine.models.weight_bytes import weight_bytes
from s1engine.ops import Matrix, Ops
from s1engine.ops.cpu_ops import CpuOps
from s1engine.ops.fp8_linear import fp8_linear
from s1engine.ops.quantization import FP8, QuantizedMatrix
from s1engine.ops.torch_ops import TorchOps

FORMATS = ("int8", "int4")


class _ScaledProducts(TorchOps):
    """fp8 as CUDA computes steps of many tokens: inputs are rounded too."""

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, QuantizedMatrix):
            return fp8_linear(x, weight, bias)
        return super().linear(x, weight, bias)


def errors(model: str, count: int) -> dict[str, Any]:
    """Errors by format against the model in bfloat16, and those of bfloat16 against float32."""
    path = resolve_model(model)
    config = ModelConfig.from_dir(path)
    traces = traces_of(LLM(model, progress=False, dtype="float32"), count)

    def logits(ops: Ops, dtype: torch.dtype, quantization: str | None = None) -> Tensor:
        decoder = load_decoder(path, config, dtype, "cpu", ops, quantization=quantization)
        parts = [forced_logits(decoder, [*p, *out], dtype)[len(p) - 1 :] for p, out in traces]
        return torch.cat(parts)

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
            str(fmt or "bfloat16"): weight_bytes(config, torch.bfloat16, fmt).total
            for fmt in (None, *FORMATS, FP8)
        },
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Errors and memory of all formats."""
    return {"model": Path(args.model).name, **errors(args.model, args.traces)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="default: bundled s1-nano")
    parser.add_argument("--traces", type=int, default=64)
