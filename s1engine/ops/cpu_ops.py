"""The operations on the CPU: the kernels of ``csrc/cpu``, and torch's matrix products.

Checks types and layouts, which the kernels take for granted, and hands them addresses. Knows no
model and no scheduler.
"""

import torch
from torch import Tensor
from torch.nn import functional

from s1engine._core import cpu
from s1engine.ops import AttentionMetadata, SamplingMetadata, torch_sampling
from s1engine.ops.torch_ops import TorchOps

# Numbered as in csrc/cpu/kernels.hpp.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CpuOps:
    """``Ops`` for float32, bfloat16 and float16 tensors in main memory; sums are in float32."""

    name: str = "cpu"

    def __init__(self) -> None:
        """Use as many threads as torch does."""
        cpu.set_num_threads(torch.get_num_threads())
        self._torch = TorchOps()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        dim = x.shape[-1]
        assert x.stride(-1) == 1 and x.dim() in (2, 3)
        assert weight.shape == (dim,) and weight.dtype is x.dtype and weight.is_contiguous()
        out = torch.empty(x.shape, dtype=x.dtype)
        inner_rows, inner_stride = (1, 0) if x.dim() == 2 else (x.shape[1], x.stride(1))
        cpu.rms_norm(
            _DTYPES[x.dtype],
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // dim,
            inner_rows,
            x.stride(0),
            inner_stride,
            dim,
            eps,
        )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, dim = x.shape
        assert x.stride(1) == 1 and residual.stride(1) == 1 and weight.is_contiguous()
        assert residual.shape == x.shape and weight.shape == (dim,)
        assert x.dtype is residual.dtype is weight.dtype
        out = torch.empty(x.shape, dtype=x.dtype)
        cpu.add_rms_norm(
            _DTYPES[x.dtype],
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows,
            x.stride(0),
            residual.stride(0),
            dim,
            eps,
        )
        return out

    def rope_write(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
    ) -> None:
        tokens, num_heads, head_dim = q.shape
        num_kv_heads = k.shape[1]
        assert k.shape == v.shape == (tokens, num_kv_heads, head_dim)
        assert _has_whole_tokens(q) and _has_whole_tokens(k) and _has_whole_tokens(v)
        assert q.dtype is k.dtype is v.dtype is k_cache.dtype
        assert cos_sin.dtype is torch.float32 and cos_sin.is_contiguous()
        assert cos_sin.shape[1] == head_dim and head_dim % 2 == 0
        _check_caches(k_cache, v_cache, num_kv_heads, head_dim)
        _check_index(meta.positions, torch.int32, tokens)
        _check_index(meta.slot_mapping, torch.int64, tokens)
        cpu.rope_write(
            _DTYPES[q.dtype],
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            cos_sin.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            meta.positions.data_ptr(),
            meta.slot_mapping.data_ptr(),
            tokens,
            num_heads,
            num_kv_heads,
            head_dim,
            k_cache.shape[2],
            q.stride(0),
            k.stride(0),
            v.stride(0),
        )

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, meta: AttentionMetadata
    ) -> Tensor:
        tokens, num_heads, head_dim = q.shape
        num_kv_heads, block_size = k_cache.shape[1:3]
        rows = meta.context_lens.shape[0]
        assert _has_whole_tokens(q) and q.dtype is k_cache.dtype and num_heads % num_kv_heads == 0
        _check_caches(k_cache, v_cache, num_kv_heads, head_dim)
        _check_index(meta.cu_seqlens_q, torch.int32, rows + 1)
        _check_index(meta.context_lens, torch.int32, rows)
        assert meta.block_table.dtype is torch.int32 and meta.block_table.stride(1) == 1
        out = torch.empty((tokens, num_heads * head_dim), dtype=q.dtype)
        cpu.paged_attention(
            _DTYPES[q.dtype],
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            meta.cu_seqlens_q.data_ptr(),
            meta.context_lens.data_ptr(),
            meta.block_table.data_ptr(),
            rows,
            meta.block_table.stride(0),
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            q.stride(0),
            scale,
        )
        return out

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        rows, dim = gate_up.shape[0], gate_up.shape[1] // 2
        assert gate_up.stride(1) == 1 and gate_up.shape == (rows, 2 * dim)
        out = torch.empty((rows, dim), dtype=gate_up.dtype)
        cpu.silu_and_mul(
            _DTYPES[gate_up.dtype],
            gate_up.data_ptr(),
            out.data_ptr(),
            rows,
            gate_up.stride(0),
            dim,
        )
        return out

    def sample(self, logits: Tensor, meta: SamplingMetadata) -> Tensor:
        rows, size = logits.shape
        assert logits.dtype is torch.float32 and logits.stride(1) == 1
        _check_sampling(meta, rows)
        plain = meta.bias is None and meta.penalties is None and meta.banned is None
        if not plain:
            torch_sampling.adjust_logits(logits, meta)
        out = torch.empty(rows, dtype=torch.int64)
        cpu.sample(
            logits.data_ptr(),
            out.data_ptr(),
            rows,
            logits.stride(0),
            size,
            meta.temperature.data_ptr(),
            meta.top_k.data_ptr(),
            meta.top_p.data_ptr(),
            meta.min_p.data_ptr(),
            meta.seeds.data_ptr(),
            meta.positions.data_ptr(),
            meta.filtered,
            plain,
        )
        return out

    def logprobs(self, logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._torch.logprobs(logits, token_ids, k)


def _has_whole_tokens(x: Tensor) -> bool:
    """Do the heads of each token of x [T, H, D] follow each other without gaps?"""
    return x.stride(2) == 1 and (x.stride(1) == x.shape[2] or x.shape[1] == 1)


def _check_caches(k_cache: Tensor, v_cache: Tensor, num_kv_heads: int, head_dim: int) -> None:
    shape = k_cache.shape  # [num_blocks, Hkv, S, D]
    assert v_cache.shape == shape and shape[1] == num_kv_heads and shape[3] == head_dim
    assert k_cache.dtype is v_cache.dtype and k_cache.is_contiguous() and v_cache.is_contiguous()


def _check_index(index: Tensor, dtype: torch.dtype, size: int) -> None:
    assert index.dtype is dtype and index.shape == (size,) and index.is_contiguous()


def _check_sampling(meta: SamplingMetadata, rows: int) -> None:
    _check_index(meta.temperature, torch.float32, rows)
    _check_index(meta.top_k, torch.int32, rows)
    _check_index(meta.top_p, torch.float32, rows)
    _check_index(meta.min_p, torch.float32, rows)
    _check_index(meta.seeds, torch.int64, rows)
    _check_index(meta.positions, torch.int64, rows)
