"""An 8-bit KV cache against one in the model's dtype: error on real traces, attention time.

The traces are the model's answers to the arithmetic task. Errors are teacher-forced: KL(full ||
8 bits) of the next-token distribution, and how often the most likely token agrees. Free-running
answers are compared too. fp8, which the CPU kernels lack, runs as its definition (``torch_ops``).
The time is that of one layer's decode attention, over caches larger than the processor's.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s1engine.bench.shapes import NAMES, shape
from s1engine.config import BUNDLED_MODEL
from s1engine.engine.llm import LLM
from s1engine.eval.arithmetic import generate
from s1engine.models.decoder import Decoder
from s1engine.models.loader import load_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.models.model_path import resolve_model
from s1engine.ops import AttentionMetadata, Ops, kv_quant
from s1engine.ops.cpu_ops import CpuOps
from s1engine.ops.torch_ops import TorchOps
from s1engine.runner.kv_cache import KVCache
from s1engine.sampling_params import SamplingParams, ThinkingBudget

BLOCK = 16
CACHE_BYTES = 2**28  # of keys and values used in turn: more than a processor's caches


def traces_of(llm: LLM, count: int, seed: int = 3) -> list[tuple[list[int], list[int]]]:
    """Prompt and greedy output of ``count`` questions, with two waits."""
    params = SamplingParams(temperature=0, max_tokens=400, thinking=ThinkingBudget(num_waits=2))
    chats = [[{"role": "user", "content": q.question}] for q in generate(seed, count)]
    outputs = llm.chat(chats, params, progress=False)
    return [(output.prompt_token_ids, output.outputs[0].token_ids) for output in outputs]


@torch.inference_mode()
def forced_logits(decoder: Decoder, tokens: list[int], cache_dtype: torch.dtype) -> Tensor:
    """Logits after every token, [len(tokens), V] float32, with a KV cache of that dtype."""
    count = len(tokens)
    blocks = -(-count // BLOCK)
    cache = KVCache(
        decoder.config, num_blocks=blocks, block_size=BLOCK, dtype=cache_dtype, device="cpu"
    )
    meta = AttentionMetadata(
        positions=torch.arange(count, dtype=torch.int32),
        slot_mapping=torch.arange(count),
        cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32),
        context_lens=torch.tensor([count], dtype=torch.int32),
        block_table=torch.arange(blocks, dtype=torch.int32)[None],
        max_seqlen_q=count,
    )
    hidden = decoder.forward(torch.tensor(tokens, dtype=torch.int32), cache.layers, meta)
    return decoder.logits(hidden, decoder.config.vocab_size)


def difference(full: Tensor, other: Tensor) -> dict[str, float]:
    """Error of logits [T, V] against those of the full cache."""
    p, q = full.double().log_softmax(-1), other.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return {
        "kl_mean": float(kl.mean()),
        "kl_p99": float(kl.quantile(0.99)),
        "kl_max": float(kl.max()),
        "greedy_agreement": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    }


def errors(model: str, count: int) -> dict[str, Any]:
    """Errors by dtype of model and cache, and those of bfloat16 against float32."""
    path = resolve_model(model)
    config = ModelConfig.from_dir(path)
    llm = LLM(model, progress=False, dtype="float32")
    traces = traces_of(llm, count)

    def logits(ops: Ops, dtype: torch.dtype, cache_dtype: torch.dtype) -> Tensor:
        decoder = load_decoder(path, config, dtype, "cpu", ops)
        parts = [forced_logits(decoder, [*p, *out], cache_dtype)[len(p) - 1 :] for p, out in traces]
        return torch.cat(parts)

    single, bf16, fp8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
    result: dict[str, Any] = {
        "traces": count,
        "tokens": sum(len(out) for _, out in traces),
        "same_answers_int8": _same_answers(model, count, traces),
    }
    exact = logits(CpuOps(), single, single)
    for dtype in (single, bf16):
        full = exact if dtype is single else logits(CpuOps(), bf16, bf16)
        name = str(dtype).removeprefix("torch.")
        result[f"{name} int8"] = difference(full, logits(CpuOps(), dtype, torch.int8))
        result[f"{name} fp8"] = difference(full, logits(TorchOps(), dtype, fp8))
        if dtype is bf16:
            result["bfloat16 against float32"] = difference(exact, full)
    return result


def _same_answers(model: str, count: int, traces: list[tuple[list[int], list[int]]]) -> int:
    """Number of outputs equal to those of the full cache, in float32."""
    llm = LLM(model, progress=False, dtype="float32", kv_cache_dtype="int8")
    return sum(mine == theirs for mine, theirs in zip(traces_of(llm, count), traces, strict=True))


def attention_calls(model: ModelConfig, context: int, rows: int) -> dict[str, Callable[[], Tensor]]:
    """Decode attention of one layer by cache dtype; each call uses the next copy of the cache."""
    blocks, ops = rows * -(-context // BLOCK), CpuOps()
    meta = AttentionMetadata(
        positions=torch.full((rows,), context - 1, dtype=torch.int32),
        slot_mapping=torch.arange(rows),
        cu_seqlens_q=torch.arange(rows + 1, dtype=torch.int32),
        context_lens=torch.full((rows,), context, dtype=torch.int32),
        block_table=torch.randperm(blocks).to(torch.int32).view(rows, -1),
        max_seqlen_q=1,
    )
    q = torch.randn(rows, model.num_heads, model.head_dim).bfloat16()
    plain = torch.randn(blocks, model.num_kv_heads, BLOCK, model.head_dim).bfloat16()

    def call_of(dtype: torch.dtype) -> Callable[[], Tensor]:
        cache = kv_quant.quantize(plain, dtype)
        copies = [cache.clone() for _ in range(max(2, -(-CACHE_BYTES // cache.nbytes)))]
        turn = itertools.count()

        def call() -> Tensor:
            at = 2 * next(turn)
            k, v = copies[at % len(copies)], copies[(at + 1) % len(copies)]
            return ops.paged_attention(q, k, v, model.head_dim**-0.5, meta)

        return call

    return {"bfloat16": call_of(torch.bfloat16), "int8": call_of(torch.int8)}


def attention_times(model: ModelConfig, context: int, rows: int, rounds: int) -> dict[str, Any]:
    """Median microseconds of both dtypes, called in turns, and the speedup of int8."""
    calls = attention_calls(model, context, rows)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(own[1:]) * 1e6 for name, own in times.items()}
    read = 2 * context * rows * model.num_kv_heads
    bytes_of = {
        name: read * kv_quant.stored_dim(model.head_dim, dtype) * dtype.itemsize
        for name, dtype in {"bfloat16": torch.bfloat16, "int8": torch.int8}.items()
    }
    return {
        "context": context,
        "batch": rows,
        **{f"{name}_us": round(us, 1) for name, us in medians.items()},
        **{f"{name}_gb_per_s": round(bytes_of[name] / us / 1e3, 2) for name, us in medians.items()},
        "speedup": round(medians["bfloat16"] / medians["int8"], 3),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Errors and attention times."""
    contexts = [int(text) for text in args.context.split(",")]
    return {
        "error": errors(args.model, args.traces) if args.traces else None,
        "attention": {
            name: [attention_times(shape(name), n, args.batch, args.rounds) for n in contexts]
            for name in args.shapes.split(",")
        },
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="default: bundled s1-nano")
    parser.add_argument("--traces", type=int, default=64, help="0: no errors")
    parser.add_argument("--shapes", default="0.5B,7B", help=f"of attention: {', '.join(NAMES)}")
    parser.add_argument("--context", default="2048,8192,32768", help="comma-separated")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once")
    parser.add_argument("--rounds", type=int, default=30)
