"""The operations on the CPU: the kernels of ``csrc/cpu``, and torch's matrix products.

Checks types and layouts, which the kernels take for granted, and hands them addresses. A decode
step makes some hundred such calls and reading one property of a tensor takes 0.1 us, so each is
read once, and a step's metadata is checked once. Knows no model and no scheduler.
"""

import torch
from torch import Tensor
from torch.nn import functional

from s1engine._core import cpu
from s1engine.ops import AttentionMetadata, SamplingMetadata, kv_rows, torch_sampling
from s1engine.ops.torch_ops import TorchOps
from s1engine.ops.unfused import Unfused

# Numbered as in csrc/cpu/kernels.hpp.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CACHE_DTYPES = {**_DTYPES, torch.int8: 3}


class CpuOps(Unfused):
    """``Ops`` for float32, bfloat16 and float16 tensors in main memory; sums are in float32."""

    name: str = "cpu"

    def __init__(self) -> None:
        """Use as many threads as torch does."""
        cpu.set_num_threads(torch.get_num_threads())
        self._torch = TorchOps()
        self._checked: AttentionMetadata | None = None

    def check_model(
        self,
        *,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        block_size: int,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
    ) -> None:
        """All shapes that a model may have are covered."""
        kv_rows.check_covered(cache_dtype, dtype, "int8", "the CPU")

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, inner_rows, dim = x.shape if x.ndim == 3 else (x.shape[0], 1, x.shape[1])
        strides = x.stride()
        assert strides[-1] == 1 and weight.shape == (dim,) and weight.dtype is x.dtype
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        cpu.rms_norm(
            _DTYPES[x.dtype],
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows * inner_rows,
            inner_rows,
            strides[0],
            strides[-2],  # of one inner row if x is a matrix: not used
            dim,
            eps,
        )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, dim = x.shape
        stride, residual_stride = _row_stride(x), _row_stride(residual)
        assert residual.shape == x.shape and weight.shape == (dim,)
        assert x.dtype is residual.dtype is weight.dtype
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        cpu.add_rms_norm(
            _DTYPES[x.dtype],
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows,
            stride,
            residual_stride,
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
        self._check(meta)
        tokens, num_heads, head_dim = q.shape
        num_kv_heads, block_size = _cache_sizes(k_cache, v_cache, q)
        assert k.shape == v.shape == (tokens, num_kv_heads, head_dim)
        assert k.dtype is v.dtype is q.dtype and meta.positions.shape[0] == tokens
        assert cos_sin.dtype is torch.float32 and cos_sin.is_contiguous()
        assert cos_sin.shape[1] == head_dim and head_dim % 2 == 0
        cpu.rope_write(
            _DTYPES[q.dtype],
            _CACHE_DTYPES[k_cache.dtype],
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
            block_size,
            _token_stride(q),
            _token_stride(k),
            _token_stride(v),
        )

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, meta: AttentionMetadata
    ) -> Tensor:
        self._check(meta)
        tokens, num_heads, head_dim = q.shape
        num_kv_heads, block_size = _cache_sizes(k_cache, v_cache, q)
        assert num_heads % num_kv_heads == 0 and meta.positions.shape[0] == tokens
        out = torch.empty((tokens, num_heads * head_dim), dtype=q.dtype)
        cpu.paged_attention(
            _DTYPES[q.dtype],
            _CACHE_DTYPES[k_cache.dtype],
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            meta.cu_seqlens_q.data_ptr(),
            meta.context_lens.data_ptr(),
            meta.block_table.data_ptr(),
            meta.context_lens.shape[0],
            meta.block_table.stride()[0],
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            _token_stride(q),
            scale,
        )
        return out

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        rows, dim = gate_up.shape[0], gate_up.shape[1] // 2
        assert gate_up.shape[1] == 2 * dim
        out = torch.empty((rows, dim), dtype=gate_up.dtype)
        cpu.silu_and_mul(
            _DTYPES[gate_up.dtype],
            gate_up.data_ptr(),
            out.data_ptr(),
            rows,
            _row_stride(gate_up),
            dim,
        )
        return out

    def sample(self, logits: Tensor, meta: SamplingMetadata) -> Tensor:
        rows, size = logits.shape
        assert logits.dtype is torch.float32
        _check_sampling(meta, rows)
        plain = meta.bias is None and meta.penalties is None and meta.banned is None
        if not plain:
            torch_sampling.adjust_logits(logits, meta)
        out = torch.empty(rows, dtype=torch.int64)
        cpu.sample(
            logits.data_ptr(),
            out.data_ptr(),
            rows,
            _row_stride(logits),
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

    def _check(self, meta: AttentionMetadata) -> None:
        if meta is not self._checked:
            rows = meta.context_lens.shape[0]
            _check_index(meta.positions, torch.int32, meta.positions.shape[0])
            _check_index(meta.slot_mapping, torch.int64, meta.positions.shape[0])
            _check_index(meta.cu_seqlens_q, torch.int32, rows + 1)
            _check_index(meta.context_lens, torch.int32, rows)
            assert meta.block_table.dtype is torch.int32 and meta.block_table.shape[0] == rows
            assert meta.block_table.stride(1) == 1
            self._checked = meta


def _row_stride(x: Tensor) -> int:
    """From row to row of a matrix whose rows are contiguous."""
    row, element = x.stride()
    assert element == 1
    return row


def _token_stride(x: Tensor) -> int:
    """From token to token of x [T, H, D], where a token's heads follow each other without gaps."""
    token, head, element = x.stride()
    assert element == 1 and (head == x.shape[2] or x.shape[1] == 1)
    return token


def _cache_sizes(k_cache: Tensor, v_cache: Tensor, q: Tensor) -> tuple[int, int]:
    """Hkv and S of caches that fit to q."""
    _, num_kv_heads, block_size, row = k_cache.shape
    assert v_cache.shape == k_cache.shape and v_cache.dtype is k_cache.dtype
    assert k_cache.dtype in (q.dtype, torch.int8)
    assert row == kv_rows.row_size(q.shape[2], k_cache.dtype)
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    return num_kv_heads, block_size


def _check_index(index: Tensor, dtype: torch.dtype, size: int) -> None:
    assert index.dtype is dtype and index.shape == (size,) and index.is_contiguous()


def _check_sampling(meta: SamplingMetadata, rows: int) -> None:
    _check_index(meta.temperature, torch.float32, rows)
    _check_index(meta.top_k, torch.int32, rows)
    _check_index(meta.top_p, torch.float32, rows)
    _check_index(meta.min_p, torch.float32, rows)
    _check_index(meta.seeds, torch.int64, rows)
    _check_index(meta.positions, torch.int64, rows)
