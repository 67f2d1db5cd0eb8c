"""What the kernels are compiled and measured for: launches by name, at the shapes of real models.

Shapes are those of Qwen2.5 at 0.5B, 7B and 32B, and the corners of the table of configurations.
Tensors stand on torch's ``meta`` device: they have shapes and types, no memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.budget_step import FIELDS, budget_step
from s1engine.kernels.linear import linear
from s1engine.kernels.norm_gate_up import norm_gate_up
from s1engine.kernels.norm_head_sample import norm_head_sample
from s1engine.kernels.norm_qkv_rope_write import norm_qkv_rope_write
from s1engine.kernels.paged_decode import paged_decode, workspace_sizes
from s1engine.kernels.paged_prefill import paged_prefill
from s1engine.kernels.rms_norm import rms_norm
from s1engine.kernels.rope_write import rope_write
from s1engine.kernels.sample import sample
from s1engine.kernels.silu_and_mul import silu_and_mul

VOCAB = 151_665


@dataclass(frozen=True, slots=True)
class CompileCase:
    """Launches one or more kernels. The first, but for a norm before it, is meant to use tensor
    cores, to load weights early."""

    launch: Callable[[], object]
    tensor_cores: bool = False
    early: bool = False


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


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _index(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return empty(*shape, dtype=dtype)


def _norm(tokens: int, width: int, residual: bool) -> object:
    x = empty(tokens, width)
    return rms_norm(x, empty(width), 1e-6, empty(tokens, width) if residual else None)


def _silu(width: int) -> object:
    return silu_and_mul(empty(32, 2 * width))


def _head_norm(heads: Heads) -> object:
    """Of q within the buffer of q, k and v."""
    qkv = empty(32, heads.q + 2 * heads.kv, heads.dim)
    return rms_norm(qkv[:, : heads.q], empty(heads.dim), 1e-6)


def _rope(heads: Heads, block_size: int, stored: torch.dtype = torch.bfloat16) -> None:
    qkv = empty(32, heads.q + 2 * heads.kv, heads.dim)
    q, k, v = torch.split(qkv, [heads.q, heads.kv, heads.kv], dim=1)
    cache = empty(64, heads.kv, block_size, heads.dim, dtype=stored)
    table = empty(4096, heads.dim, dtype=torch.float32)
    slots = _index(32, dtype=torch.int64)
    rope_write(q, k, v, table, cache, cache, _index(32), slots)


def _decode(
    heads: Heads,
    rows: int,
    block_size: int,
    dtype: torch.dtype,
    stored: torch.dtype | None = None,
) -> object:
    cache = empty(64, heads.kv, block_size, heads.dim, dtype=stored or dtype)
    floats, counters = workspace_sizes(rows, heads.kv, heads.dim, heads.q // heads.kv)
    return paged_decode(
        empty(rows, heads.q, heads.dim, dtype=dtype),
        cache,
        cache,
        _index(rows, 512),
        _index(rows),
        0.1,
        empty(floats, dtype=torch.float32),
        _index(counters),
    )


def _extend(
    heads: Heads,
    max_seqlen_q: int,
    block_size: int,
    dtype: torch.dtype,
    stored: torch.dtype | None = None,
) -> object:
    cache = empty(64, heads.kv, block_size, heads.dim, dtype=stored or dtype)
    return paged_prefill(
        empty(2048, heads.q, heads.dim, dtype=dtype),
        cache,
        cache,
        _index(8, 512),
        _index(9),
        _index(8),
        max_seqlen_q,
        0.1,
    )


def _sample(filtered: bool, clean: bool, triggers: int) -> object:
    rows = 8
    columns = [empty(rows, dtype=torch.float32) for _ in range(3)]
    wide = _index(rows, dtype=torch.int64)
    return sample(
        empty(rows, VOCAB, dtype=torch.float32),
        columns[0],
        _index(rows),
        columns[1],
        columns[2],
        wide,
        wide,
        filtered=filtered,
        clean=clean,
        banned=_index(rows) if triggers else None,
        triggers=_index(triggers) if triggers else None,
    )


def _workspace() -> tuple[Tensor, Tensor]:
    floats, counters = launch_table.SPLIT_K_WORKSPACE
    return empty(floats, dtype=torch.float32), _index(counters)


def _matrix(n: int, k: int, dtype: torch.dtype, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """Weights and, in fp8, their scales."""
    if fp8:
        return empty(n, k, dtype=torch.float8_e4m3fn), empty(n, dtype=torch.float32)
    return empty(n, k, dtype=dtype), None


def _linear(tokens: int, n: int, k: int, dtype: torch.dtype, fp8: bool = False) -> object:
    x, out = empty(tokens, k, dtype=dtype), empty(tokens, n, dtype=dtype)
    weight, scale = _matrix(n, k, dtype, fp8)
    return linear(x, weight, None, _workspace(), out, scale)


def _norm_gate_up(tokens: int, f: int, k: int, dtype: torch.dtype, fp8: bool = False) -> object:
    x, norm = empty(tokens, k, dtype=dtype), empty(k, dtype=dtype)
    weight, scale = _matrix(2 * f, k, dtype, fp8)
    return norm_gate_up(x, norm, 1e-6, weight, _workspace(), scale)


def _norm_qkv(
    tokens: int,
    heads: Heads,
    k: int,
    dtype: torch.dtype,
    stored: torch.dtype | None = None,
    fp8: bool = False,
) -> object:
    n = (heads.q + 2 * heads.kv) * heads.dim
    x, norm = empty(tokens, k, dtype=dtype), empty(k, dtype=dtype)
    weight, scale = _matrix(n, k, dtype, fp8)
    cache = empty(64, heads.kv, 64, heads.dim, dtype=stored or dtype)
    table = empty(4096, heads.dim)
    return norm_qkv_rope_write(
        x, norm, 1e-6, weight, empty(n, dtype=dtype), table.float(), cache, cache,
        _index(tokens), _index(tokens, dtype=torch.int64), _workspace(), scale,
    )  # fmt: skip


def _norm_head(tokens: int, k: int, dtype: torch.dtype, triggers: int = 0) -> object:
    x, norm, weight = (empty(*shape, dtype=dtype) for shape in ((tokens, k), (k,), (VOCAB, k)))
    wide = _index(tokens, dtype=torch.int64)
    return norm_head_sample(
        x, norm, 1e-6, weight, empty(tokens, dtype=torch.float32), wide, wide,
        banned=_index(tokens) if triggers else None,
        triggers=_index(triggers) if triggers else None,
    )  # fmt: skip


def _step(rows: int) -> None:
    budget_step(
        _index(rows, dtype=torch.int64),
        _index(len(FIELDS), rows),
        _index(1000),
        _index(3),
        empty(VOCAB, dtype=torch.uint8),
        _index(rows, 512),
        slot_mapping=_index(rows, dtype=torch.int64),
        sample_positions=_index(rows, dtype=torch.int64),
        output_tokens=_index(32, rows),
        step_counter=_index(1),
        block_size=64,
        null_slot=64,
    )


def _attention_cases() -> dict[str, CompileCase]:
    bf16, half, single = torch.bfloat16, torch.float16, torch.float32
    cases: dict[str, CompileCase] = {}
    for name, heads in (HEADS | CORNERS).items():
        for rows in (1, 128):
            cases[f"decode {name} B={rows}"] = CompileCase(
                partial(_decode, heads, rows, 64, bf16),
                True,
            )
        for most in (1, 4, 8, 2048):
            cases[f"extend {name} q<={most}"] = CompileCase(
                partial(_extend, heads, most, 64, bf16),
                True,
            )
    seven = HEADS["7B"]
    for size in (16, 32, 128):
        cases[f"decode 7B S={size}"] = CompileCase(
            partial(_decode, seven, 8, size, bf16),
            True,
        )
        cases[f"extend 7B S={size}"] = CompileCase(
            partial(_extend, seven, 2048, size, bf16),
            True,
        )
    cases["decode 7B fp16"] = CompileCase(lambda: _decode(seven, 8, 64, half), True)
    cases["extend 7B fp16"] = CompileCase(lambda: _extend(seven, 2048, 64, half), True)
    for name, heads in {"7B": seven, "D=16": CORNERS["D=16"], "D=32": CORNERS["D=32"]}.items():
        cases[f"decode {name} fp32"] = CompileCase(partial(_decode, heads, 8, 64, single))
        cases[f"extend {name} fp32"] = CompileCase(partial(_extend, heads, 2048, 64, single))
    return cases


def _fp8_cache_cases() -> dict[str, CompileCase]:
    bf16, half, fp8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
    seven = HEADS["7B"]
    cases: dict[str, CompileCase] = {}
    for name, heads in (HEADS | CORNERS).items():
        cases[f"decode {name} fp8 cache"] = CompileCase(
            partial(_decode, heads, 8, 64, bf16, fp8), True
        )
        for most in (4, 2048):
            cases[f"extend {name} fp8 cache q<={most}"] = CompileCase(
                partial(_extend, heads, most, 64, bf16, fp8), True
            )
        cases[f"rope {name} fp8 cache"] = CompileCase(partial(_rope, heads, 64, fp8))
    for most in (1, 8):
        cases[f"extend 7B fp8 cache q<={most}"] = CompileCase(
            partial(_extend, seven, most, 64, bf16, fp8), True
        )
    for size in (16, 128):
        cases[f"decode 7B fp8 cache S={size}"] = CompileCase(
            partial(_decode, seven, 8, size, bf16, fp8), True
        )
    cases["decode 7B fp16 fp8 cache"] = CompileCase(partial(_decode, seven, 8, 64, half, fp8), True)
    for t in (1, 64):
        cases[f"norm_qkv 7B fp8 cache T={t}"] = CompileCase(
            partial(_norm_qkv, t, seven, 3584, bf16, fp8), t > 2, True
        )
    return cases


def _row_cases() -> dict[str, CompileCase]:
    cases: dict[str, CompileCase] = {}
    for width in (896, 3584, 5120, 16384):
        cases[f"norm {width}"] = CompileCase(partial(_norm, 32, width, False))
        cases[f"add and norm {width}"] = CompileCase(partial(_norm, 32, width, True))
    cases["norm of heads D=128"] = CompileCase(lambda: _head_norm(HEADS["7B"]))
    for width in (4864, 18944):
        cases[f"silu {width}"] = CompileCase(partial(_silu, width))
    for name, heads in (HEADS | CORNERS).items():
        cases[f"rope {name}"] = CompileCase(partial(_rope, heads, 64))
    return cases


def _linear_cases() -> dict[str, CompileCase]:
    bf16, half, single = torch.bfloat16, torch.float16, torch.float32
    small, seven = HEADS["0.5B"], HEADS["7B"]
    launches: dict[str, Callable[[], object]] = {}
    for t in (1, 2, 16, 64):
        launches[f"linear 7B T={t}"] = partial(_linear, t, 3584, 3584, bf16)
        launches[f"norm_qkv 7B T={t}"] = partial(_norm_qkv, t, seven, 3584, bf16)
    for t in (1, 2, 16, 32, 64):
        launches[f"norm_gate_up 7B T={t}"] = partial(_norm_gate_up, t, 18944, 3584, bf16)
        launches[f"norm_head 7B T={t}"] = partial(_norm_head, t, 3584, bf16)
    for t in (1, 16):
        launches[f"linear 0.5B T={t}"] = partial(_linear, t, 896, 4864, bf16)
        launches[f"norm_qkv 0.5B T={t}"] = partial(_norm_qkv, t, small, 896, bf16)
    launches["norm_head 7B in a graph T=64"] = partial(_norm_head, 64, 3584, bf16, 3)
    launches["norm_gate_up 7B fp16 T=64"] = partial(_norm_gate_up, 64, 18944, 3584, half)
    cases = {
        name: CompileCase(launch, not name.endswith(("T=1", "T=2")), True)
        for name, launch in launches.items()
    }
    for t in (2, 64):
        cases[f"norm_qkv 7B fp32 T={t}"] = CompileCase(
            partial(_norm_qkv, t, seven, 3584, single), early=True
        )
        cases[f"norm_head 7B fp32 T={t}"] = CompileCase(
            partial(_norm_head, t, 3584, single), early=True
        )
    return cases


def _fp8_weight_cases() -> dict[str, CompileCase]:
    """The products of a decode step whose weights are fp8, each at the shape of its matrix."""
    bf16, half = torch.bfloat16, torch.float16
    launches: dict[str, Callable[[], object]] = {}
    for name, hidden, inner, steps in (
        ("7B", 3584, 18944, (1, 2, 16, 64)),
        ("32B", 5120, 27648, (1, 16)),
    ):
        heads = HEADS[name]
        for t in steps:
            sizes = {
                "o": partial(_linear, t, hidden, heads.q * heads.dim, bf16, True),
                "down": partial(_linear, t, hidden, inner, bf16, True),
                "norm_gate_up": partial(_norm_gate_up, t, inner, hidden, bf16, True),
                "norm_qkv": partial(_norm_qkv, t, heads, hidden, bf16, None, True),
            }
            launches |= {f"{of} {name} fp8 weights T={t}": call for of, call in sizes.items()}
    eight = torch.float8_e4m3fn
    launches["norm_qkv 7B fp8 weights and cache T=16"] = partial(
        _norm_qkv, 16, HEADS["7B"], 3584, bf16, eight, True
    )
    launches["norm_gate_up 7B fp16 fp8 weights T=16"] = partial(
        _norm_gate_up, 16, 18944, 3584, half, True
    )
    return {
        name: CompileCase(launch, not name.endswith(("T=1", "T=2")), True)
        for name, launch in launches.items()
    }


CASES: dict[str, CompileCase] = {
    **_attention_cases(),
    **_fp8_cache_cases(),
    **_row_cases(),
    **_linear_cases(),
    **_fp8_weight_cases(),
    "sample": CompileCase(lambda: _sample(filtered=False, clean=False, triggers=0)),
    "sample adjusted": CompileCase(lambda: _sample(filtered=False, clean=True, triggers=0)),
    "sample filtered": CompileCase(lambda: _sample(filtered=True, clean=False, triggers=0)),
    "sample in a graph": CompileCase(lambda: _sample(filtered=True, clean=False, triggers=3)),
    "step B=1": CompileCase(lambda: _step(1)),
    "step B=128": CompileCase(lambda: _step(128)),
}
