"""Launches that ``compile_report`` compiles, by name: the kernel and the shapes of real models.

Shapes are those of Qwen2.5 at 0.5B, 7B and 32B, and the corners of ``launch_table``. Tensors are on
torch's ``meta`` device: they have shapes and types, no memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from s1engine.kernels import launch_table, row_fields
from s1engine.kernels.all_reduce import Inboxes, all_reduce
from s1engine.kernels.budget_step import budget_step
from s1engine.kernels.linear import linear
from s1engine.kernels.norm_gate_up import norm_gate_up
from s1engine.kernels.norm_head_sample import best_of_shard, norm_head_sample
from s1engine.kernels.norm_qkv_rope_write import norm_qkv_rope_write
from s1engine.kernels.paged_decode import paged_decode, workspace_sizes
from s1engine.kernels.paged_prefill import paged_prefill
from s1engine.kernels.rms_norm import rms_norm
from s1engine.kernels.rope_write import rope_write
from s1engine.kernels.sample import sample
from s1engine.kernels.silu_and_mul import silu_and_mul

VOCAB = 151_665
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class CompileCase:
    """Launches one or more kernels. The flags hold for the first that is not a norm."""

    launch: Callable[[], object]
    tensor_cores: bool = False  # it must use them
    early: bool = False  # it must load weights before it waits for the previous kernel
    ptx: tuple[str, ...] = ()  # parts of instructions that the last kernel must have


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, KV heads and head size of a model."""

    q: int
    kv: int
    dim: int


HEADS = {"0.5B": Heads(14, 2, 64), "7B": Heads(28, 4, 128), "32B": Heads(40, 8, 128)}
CORNERS = {
    "D=16": Heads(4, 2, 16),
    "D=32": Heads(8, 8, 32),
    "D=256": Heads(16, 8, 256),
    "G=64": Heads(64, 1, 128),
}


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _ints(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int32)


def _longs(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


def _norm(tokens: int, width: int, residual: bool) -> object:
    x = empty(tokens, width)
    return rms_norm(x, empty(width), 1e-6, empty(tokens, width) if residual else None)


def _all_reduce(size: int, width: int, residual: bool, norm: bool = False) -> object:
    """Of a rank among ``size``."""
    x = empty(16, width)
    inboxes = Inboxes(1, width, BF16, _longs(2, size), _ints(64), _ints(1))
    return all_reduce(x, inboxes, empty(16, width) if residual else None,
                      empty(width) if norm else None, 1e-6)  # fmt: skip


def _head_norm(heads: Heads) -> object:
    """Of q within the buffer of q, k and v."""
    qkv = empty(32, heads.q + 2 * heads.kv, heads.dim)
    return rms_norm(qkv[:, : heads.q], empty(heads.dim), 1e-6)


def _rope(heads: Heads, stored: torch.dtype = BF16) -> None:
    qkv = empty(32, heads.q + 2 * heads.kv, heads.dim)
    q, k, v = torch.split(qkv, [heads.q, heads.kv, heads.kv], dim=1)
    cache = empty(64, heads.kv, 64, heads.dim, dtype=stored)
    cos_sin = empty(4096, heads.dim, dtype=FP32)
    rope_write(q, k, v, cos_sin, cache, cache, _ints(32), _longs(32))


def _decode(
    heads: Heads, rows: int, block_size: int = 64, dtype: torch.dtype = BF16,
    stored: torch.dtype | None = None, window: int = 0, sinks: bool = False,
) -> object:  # fmt: skip
    cache = empty(64, heads.kv, block_size, heads.dim, dtype=stored or dtype)
    floats, counters = workspace_sizes(rows, heads.kv, heads.dim, heads.q // heads.kv)
    return paged_decode(
        empty(rows, heads.q, heads.dim, dtype=dtype), cache, cache, _ints(rows, 512), _ints(rows),
        0.1, empty(floats, dtype=FP32), _ints(counters),
        window=window, sinks=empty(heads.q, dtype=FP32) if sinks else None,
    )  # fmt: skip


def _prefill(
    heads: Heads, max_seqlen_q: int, block_size: int = 64, dtype: torch.dtype = BF16,
    stored: torch.dtype | None = None, window: int = 0, sinks: bool = False,
) -> object:  # fmt: skip
    cache = empty(64, heads.kv, block_size, heads.dim, dtype=stored or dtype)
    return paged_prefill(
        empty(2048, heads.q, heads.dim, dtype=dtype), cache, cache,
        _ints(8, 512), _ints(9), _ints(8), max_seqlen_q, 0.1,
        window, empty(heads.q, dtype=FP32) if sinks else None,
    )  # fmt: skip


def _sample(filtered: bool, sanitized: bool, triggers: int) -> object:
    rows = 8
    temperature, top_p, min_p = (empty(rows, dtype=FP32) for _ in range(3))
    return sample(
        empty(rows, VOCAB, dtype=FP32), temperature, _ints(rows), top_p, min_p,
        _longs(rows), _longs(rows), filtered=filtered, logits_sanitized=sanitized,
        banned=_ints(rows) if triggers else None, triggers=_ints(triggers) if triggers else None,
    )  # fmt: skip


def _workspace() -> tuple[Tensor, Tensor]:
    floats, counters = launch_table.SPLIT_K_WORKSPACE
    return empty(floats, dtype=FP32), _ints(counters)


def _matrix(n: int, k: int, dtype: torch.dtype, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """A weight and, in fp8, its scales."""
    if fp8:
        return empty(n, k, dtype=FP8), empty(n, dtype=FP32)
    return empty(n, k, dtype=dtype), None


def _linear(tokens: int, n: int, k: int, dtype: torch.dtype = BF16, fp8: bool = False) -> object:
    x, out = empty(tokens, k, dtype=dtype), empty(tokens, n, dtype=dtype)
    weight, scale = _matrix(n, k, dtype, fp8)
    return linear(x, weight, None, _workspace(), out, scale)


def _gate_up(tokens: int, f: int, k: int, dtype: torch.dtype = BF16, fp8: bool = False) -> object:
    x, norm = empty(tokens, k, dtype=dtype), empty(k, dtype=dtype)
    weight, scale = _matrix(2 * f, k, dtype, fp8)
    return norm_gate_up(x, norm, 1e-6, weight, _workspace(), scale)


def _qkv(
    tokens: int, heads: Heads, k: int, dtype: torch.dtype = BF16,
    stored: torch.dtype | None = None, fp8: bool = False,
) -> object:  # fmt: skip
    n = (heads.q + 2 * heads.kv) * heads.dim
    x, norm = empty(tokens, k, dtype=dtype), empty(k, dtype=dtype)
    weight, scale = _matrix(n, k, dtype, fp8)
    cache = empty(64, heads.kv, 64, heads.dim, dtype=stored or dtype)
    cos_sin = empty(4096, heads.dim, dtype=FP32)
    return norm_qkv_rope_write(
        x, norm, 1e-6, weight, empty(n, dtype=dtype), cos_sin, cache, cache,
        _ints(tokens), _longs(tokens), _workspace(), scale,
    )  # fmt: skip


def _head(tokens: int, k: int, dtype: torch.dtype = BF16, triggers: int = 0) -> object:
    x, norm, weight = (empty(*shape, dtype=dtype) for shape in ((tokens, k), (k,), (VOCAB, k)))
    return norm_head_sample(
        x, norm, 1e-6, weight, empty(tokens, dtype=FP32), _longs(tokens), _longs(tokens),
        banned=_ints(tokens) if triggers else None,
        triggers=_ints(triggers) if triggers else None,
    )  # fmt: skip


def _shard(tokens: int, k: int) -> object:
    """The part of the head that the second of two ranks holds."""
    first = VOCAB // 8 * 4
    x, norm, weight = empty(tokens, k), empty(k), empty(VOCAB - first, k)
    return best_of_shard(
        x, norm, 1e-6, weight, empty(tokens, dtype=FP32), _longs(tokens), _longs(tokens), first,
        banned=_ints(tokens), triggers=_ints(3),
    )  # fmt: skip


def _step(rows: int, states: int = 0) -> None:
    lens, table = empty(VOCAB, dtype=torch.uint8), empty(states, VOCAB, dtype=torch.uint8)
    budget_step(
        _longs(rows), _ints(row_fields.NUM_FIELDS, rows), _ints(1000), _ints(3),
        empty(VOCAB, dtype=torch.uint8), _ints(rows, 512),
        slot_mapping=_longs(rows), sample_positions=_longs(rows), output_tokens=_ints(32, rows),
        step_counter=_ints(1), block_size=64, null_slot=64,
        markers=(table, _ints(states), lens) if states else None,
    )  # fmt: skip


def _attention_cases() -> dict[str, CompileCase]:
    launches: dict[str, Callable[[], object]] = {}
    for name, heads in (HEADS | CORNERS).items():
        for rows in (1, 128):
            launches[f"paged_decode {name} B={rows}"] = partial(_decode, heads, rows)
        for most in (1, 4, 8, 2048):
            launches[f"paged_prefill {name} q<={most}"] = partial(_prefill, heads, most)
    seven = HEADS["7B"]
    for size in (16, 32, 128):
        launches[f"paged_decode 7B S={size}"] = partial(_decode, seven, 8, size)
        launches[f"paged_prefill 7B S={size}"] = partial(_prefill, seven, 2048, size)
    launches["paged_decode 7B fp16"] = partial(_decode, seven, 8, 64, FP16)
    launches["paged_prefill 7B fp16"] = partial(_prefill, seven, 2048, 64, FP16)
    cases = {name: CompileCase(launch, tensor_cores=True) for name, launch in launches.items()}
    for name, heads in {"7B": seven, "D=16": CORNERS["D=16"], "D=32": CORNERS["D=32"]}.items():
        cases[f"paged_decode {name} fp32"] = CompileCase(partial(_decode, heads, 8, 64, FP32))
        cases[f"paged_prefill {name} fp32"] = CompileCase(partial(_prefill, heads, 2048, 64, FP32))
    return cases


def _window_cases() -> dict[str, CompileCase]:
    """Windows and sinks: the shapes of Mistral, Gemma 3 and gpt-oss."""
    mistral, gemma, gpt_oss = Heads(32, 8, 128), CORNERS["D=256"], Heads(64, 8, 64)
    launches: dict[str, Callable[[], object]] = {
        "paged_decode gpt-oss sinks": partial(_decode, gpt_oss, 8, sinks=True),
        "paged_prefill gpt-oss sinks": partial(_prefill, gpt_oss, 2048, sinks=True),
    }
    for name, heads, window, sinks in (
        ("7B", mistral, 4096, False),
        ("D=256", gemma, 1024, False),
        ("gpt-oss sinks", gpt_oss, 128, True),
    ):
        for label, stored in (("", None), (" fp8 cache", FP8)):
            kind = f"{name} W={window}{label}"
            rest = (64, BF16, stored, window, sinks)
            launches[f"paged_decode {kind}"] = partial(_decode, heads, 8, *rest)
            for most in (4, 2048):
                launches[f"paged_prefill {kind} q<={most}"] = partial(_prefill, heads, most, *rest)
    return {name: CompileCase(launch, tensor_cores=True) for name, launch in launches.items()}


def _fp8_cache_cases() -> dict[str, CompileCase]:
    seven = HEADS["7B"]
    launches: dict[str, Callable[[], object]] = {}
    for name, heads in (HEADS | CORNERS).items():
        launches[f"paged_decode {name} fp8 cache"] = partial(_decode, heads, 8, 64, BF16, FP8)
        for most in (1, 4, 8, 2048) if name == "7B" else (4, 2048):
            label = f"paged_prefill {name} fp8 cache q<={most}"
            launches[label] = partial(_prefill, heads, most, 64, BF16, FP8)
    for size in (16, 128):
        label = f"paged_decode 7B fp8 cache S={size}"
        launches[label] = partial(_decode, seven, 8, size, BF16, FP8)
    launches["paged_decode 7B fp16 fp8 cache"] = partial(_decode, seven, 8, 64, FP16, FP8)
    cases = {name: CompileCase(launch, tensor_cores=True) for name, launch in launches.items()}
    for name, heads in (HEADS | CORNERS).items():
        cases[f"rope_write {name} fp8 cache"] = CompileCase(partial(_rope, heads, FP8))
    for t in (1, 64):
        cases[f"norm_qkv_rope_write 7B fp8 cache T={t}"] = CompileCase(
            partial(_qkv, t, seven, 3584, BF16, FP8), t > 2, early=True
        )
    return cases


def _elementwise_cases() -> dict[str, CompileCase]:
    launches: dict[str, Callable[[], object]] = {}
    for width in (896, 3584, 5120, 16384):
        launches[f"rms_norm {width}"] = partial(_norm, 32, width, False)
        launches[f"rms_norm {width} with residual"] = partial(_norm, 32, width, True)
    launches["rms_norm of heads D=128"] = partial(_head_norm, HEADS["7B"])
    for width in (4864, 18944):
        launches[f"silu_and_mul {width}"] = partial(silu_and_mul, empty(32, 2 * width))
    for name, heads in (HEADS | CORNERS).items():
        launches[f"rope_write {name}"] = partial(_rope, heads)
    return {name: CompileCase(launch) for name, launch in launches.items()}


def _all_reduce_cases() -> dict[str, CompileCase]:
    """Flags are raised and read at the scope of all devices."""
    launches: dict[str, Callable[[], object]] = {
        "2 ranks": partial(_all_reduce, 2, 5120, False),
        "8 ranks": partial(_all_reduce, 8, 5120, False),
        "2 ranks with residual": partial(_all_reduce, 2, 5120, True),
        "8 ranks with residual": partial(_all_reduce, 8, 5120, True),
        "2 ranks with norm": partial(_all_reduce, 2, 5120, True, True),
        "2 ranks H=16384 with norm": partial(_all_reduce, 2, 16384, True, True),
    }
    scopes = (".sys.release", ".sys.acquire", "st.global.v4", "ld.global.cg.v4")
    return {
        f"all_reduce {name}": CompileCase(launch, ptx=scopes) for name, launch in launches.items()
    }


def _skinny_cases(launches: dict[str, Callable[[], object]]) -> dict[str, CompileCase]:
    """All load weights early; for more than two tokens they use tensor cores."""
    return {
        name: CompileCase(launch, not name.endswith(("T=1", "T=2")), early=True)
        for name, launch in launches.items()
    }


def _linear_cases() -> dict[str, CompileCase]:
    small, seven = HEADS["0.5B"], HEADS["7B"]
    launches: dict[str, Callable[[], object]] = {}
    for t in (1, 2, 16, 64):
        launches[f"linear 7B T={t}"] = partial(_linear, t, 3584, 3584)
        launches[f"norm_qkv_rope_write 7B T={t}"] = partial(_qkv, t, seven, 3584)
    for t in (1, 2, 16, 32, 64):
        launches[f"norm_gate_up 7B T={t}"] = partial(_gate_up, t, 18944, 3584)
        launches[f"norm_head_sample 7B T={t}"] = partial(_head, t, 3584)
    for t in (1, 16):
        launches[f"linear 0.5B T={t}"] = partial(_linear, t, 896, 4864)
        launches[f"norm_qkv_rope_write 0.5B T={t}"] = partial(_qkv, t, small, 896)
    launches["norm_head_sample 7B with triggers T=64"] = partial(_head, 64, 3584, BF16, 3)
    for t in (1, 64):
        launches[f"best_of_shard 32B T={t}"] = partial(_shard, t, 5120)
    launches["norm_gate_up 7B fp16 T=64"] = partial(_gate_up, 64, 18944, 3584, FP16)
    cases = _skinny_cases(launches)
    for t in (2, 64):
        for name, launch in (
            ("norm_qkv_rope_write", partial(_qkv, t, seven, 3584, FP32)),
            ("norm_head_sample", partial(_head, t, 3584, FP32)),
        ):
            cases[f"{name} 7B fp32 T={t}"] = CompileCase(launch, early=True)
    return cases


def _fp8_weight_cases() -> dict[str, CompileCase]:
    """The products of a decode step with fp8 weights, each at the shape of its matrix."""
    launches: dict[str, Callable[[], object]] = {}
    for name, hidden, inner, steps in (
        ("7B", 3584, 18944, (1, 2, 16, 64)),
        ("32B", 5120, 27648, (1, 16)),
    ):
        heads = HEADS[name]
        for t in steps:
            products = {
                "linear o": partial(_linear, t, hidden, heads.q * heads.dim, BF16, True),
                "linear down": partial(_linear, t, hidden, inner, BF16, True),
                "norm_gate_up": partial(_gate_up, t, inner, hidden, BF16, True),
                "norm_qkv_rope_write": partial(_qkv, t, heads, hidden, BF16, None, True),
            }
            launches |= {f"{of} {name} fp8 weights T={t}": call for of, call in products.items()}
    launches["norm_qkv_rope_write 7B fp8 weights and cache T=16"] = partial(
        _qkv, 16, HEADS["7B"], 3584, BF16, FP8, True
    )
    launches["norm_gate_up 7B fp16 fp8 weights T=16"] = partial(
        _gate_up, 16, 18944, 3584, FP16, True
    )
    return _skinny_cases(launches)


CASES: dict[str, CompileCase] = {
    **_attention_cases(),
    **_window_cases(),
    **_fp8_cache_cases(),
    **_elementwise_cases(),
    **_all_reduce_cases(),
    **_linear_cases(),
    **_fp8_weight_cases(),
    "sample": CompileCase(partial(_sample, False, False, 0)),
    "sample sanitized": CompileCase(partial(_sample, False, True, 0)),
    "sample filtered": CompileCase(partial(_sample, True, False, 0)),
    "sample filtered with triggers": CompileCase(partial(_sample, True, False, 3)),
    **{
        f"budget_step B={rows}{label}": CompileCase(partial(_step, rows, states))
        for rows in (1, 128, 256, 512, 1024)
        for label, states in (("", 0), (" end markers", 20))
    },
}
