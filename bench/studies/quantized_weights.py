"""Quantised weights against the checkpoint's: error on real traces, and memory.

The traces are the model's answers to the arithmetic task, in float32, or with ``--text`` the
problems and solutions of a file, as chats. Errors are teacher-forced, as in
``quantized_kv_cache``: KL(full || quantised) of the next-token distribution, and how often the most
likely token agrees. "format alone" runs the definition (``torch_ops``), without the device's
rounding of activations to 8 bits. fp8 is a CUDA format: here its definition runs, and the scaled
product of ``fp8_linear``.
"""

import argparse
import json
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
from s1engine.tokenizer import Tokenizer

FORMATS = ("int8", "int4")
TEXT_TOKENS = 128


class _ScaledProducts(TorchOps):
    """fp8 as CUDA computes steps of many tokens: inputs are rounded too."""

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, QuantizedMatrix):
            return fp8_linear(x, weight, bias)
        return super().linear(x, weight, bias)


def texts_of(path: Path, file: Path, count: int) -> list[tuple[list[int], list[int]]]:
    """Prompt and solution of the first ``count`` rows of a JSONL file of problems; of a solution at
    most TEXT_TOKENS tokens."""
    tokenizer = Tokenizer.from_dir(path)
    traces = []
    for line in file.read_text(encoding="utf-8").splitlines()[:count]:
        row = json.loads(line)
        prompt = tokenizer.render_chat([{"role": "user", "content": row["problem"]}])
        solution = tokenizer.encode(row["solution"])[:TEXT_TOKENS]
        traces.append((tokenizer.encode(prompt), solution))
    return traces


def errors(model: str, count: int, text: str | None) -> dict[str, Any]:
    """Errors by format against the model in bfloat16, and those of bfloat16 against float32."""
    path = resolve_model(model)
    config = ModelConfig.from_dir(path)
    if text is None:
        traces = traces_of(LLM(model, progress=False, dtype="float32"), count)
    else:
        traces = texts_of(path, Path(text), count)

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
    text = None if args.text is None else Path(args.text).name
    return {
        "model": Path(args.model).name,
        "text": text,
        **errors(args.model, args.traces, args.text),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="default: bundled s1-nano")
    parser.add_argument("--traces", type=int, default=64)
    parser.add_argument(
        "--text", metavar="FILE", help="JSONL with problem and solution, instead of traces"
    )
