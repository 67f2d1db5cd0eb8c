"""The operations on the CPU: the kernels of ``csrc/cpu``.

Checks types and layouts, which the kernels take for granted, and hands them addresses; a step's
metadata is checked once. Knows no model and no scheduler.

Within ``reusing`` results live in a workspace that the next call of the same operation overwrites.
So a step allocates nothing, and one of known sizes touches the same memory every time, which is
what lets it be replayed without Python.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from s1engine._core import cpu
from s1engine.errors import RequestError
from s1engine.ops import AttentionMetadata, Matrix, SamplingMetadata, kv_rows, torch_sampling
from s1engine.ops.packed import PANEL, PackedMatrix, pack
from s1engine.ops.quantization import FORMATS, QuantizedMatrix
from s1engine.ops.torch_ops import TorchOps
from s1engine.ops.unfused import Unfused

# Numbered as in csrc/cpu/kernels.hpp.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CACHE_DTYPES = {**_DTYPES, torch.int8: 3}
_STORE, _STORE_FLOAT, _ADD, _GATE = range(4)


class Workspace:
    """Memory for results, one buffer for each name, as large as was ever needed."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self.generation = 0
        """Grows whenever a buffer moves: what was recorded before is void."""

    def get(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[rows, width] of undefined content."""
        size = rows * width * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < size:
            buffer = torch.empty(size, dtype=torch.uint8)
            self._buffers[name] = buffer
            self.generation += 1
        return buffer[:size].view(dtype).view(rows, width)


class CpuOps(Unfused):
    """``Ops`` for float32, bfloat16 and float16 tensors in main memory; sums are in float32, and
    what a token gives depends neither on the other tokens of a step nor on the number of
    threads."""

    name: str = "cpu"

    def __init__(self) -> None:
        """Use as many threads as torch does."""
        cpu.set_num_threads(torch.get_num_threads())
        self._torch = TorchOps()
        self._checked: AttentionMetadata | None = None
        self.workspace = Workspace()
        self._reuses = False

    @contextmanager
    def reusing(self) -> Iterator[None]:
        """What is returned in here is valid until the same operation is called again."""
        self._reuses = True
        try:
            yield
        finally:
            self._reuses = False

    def _out(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        if self._reuses:
            return self.workspace.get(name, rows, width, dtype)
        return torch.empty(rows, width, dtype=dtype)

    def check_model(
        self,
        *,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        block_size: int,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        quantization: str | None = None,
    ) -> None:
        """All shapes that a model may have are covered."""
        kv_rows.check_covered(cache_dtype, dtype, "int8", "the CPU")
        if quantization is not None and quantization not in FORMATS:
            raise RequestError(
                f"quantization {quantization} is not for the CPU, which has {', '.join(FORMATS)}",
                param="quantization",
            )

    def pack(self, weight: Tensor | QuantizedMatrix) -> PackedMatrix:
        return pack(weight)

    def embed(self, ids: Tensor, weight: Matrix) -> Tensor:
        _check_index(ids, torch.int32, ids.shape[0])
        if isinstance(weight, Tensor):
            return self._take_rows("embed", weight, ids)
        packed = _packed(weight)
        rows, (outputs, columns) = ids.shape[0], packed.shape
        out = self._out("embed", rows, columns, packed.dtype)
        cpu.embed(
            _DTYPES[packed.dtype],
            packed.format,
            ids.data_ptr(),
            packed.panels.data_ptr(),
            _address(packed.scales),
            out.data_ptr(),
            rows,
            columns,
            outputs,
            packed.group,
        )
        return out

    def take_rows(self, x: Tensor, index: Tensor) -> Tensor:
        return self._take_rows("rows", x, index)

    def _take_rows(self, name: str, x: Tensor, index: Tensor) -> Tensor:
        _check_index(index, torch.int32, index.shape[0])
        assert x.is_contiguous()
        rows, width = index.shape[0], x.shape[1]
        out = self._out(name, rows, width, x.dtype)
        size = width * x.dtype.itemsize
        cpu.take_rows(x.data_ptr(), index.data_ptr(), out.data_ptr(), rows, size)
        return out

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
        self._linear(x, weight, bias, out, _STORE)
        return out

    def logits(self, hidden: Tensor, norm: Tensor, eps: float, weight: Matrix) -> Tensor:
        x = self._norm(None, hidden, norm, eps)
        out = self._out("logits", x.shape[0], weight.shape[0], torch.float32)
        self._linear(x, weight, None, out, _STORE_FLOAT)
        return out

    def linear_residual(
        self, x: Tensor, weight: Matrix, bias: Tensor | None, residual: Tensor
    ) -> Tensor | None:
        assert residual.dtype is x.dtype
        self._linear(x, weight, bias, residual, _ADD)
        return None

    def norm_gate_up(
        self,
        branch: Tensor | None,
        residual: Tensor,
        norm: Tensor,
        eps: float,
        weight: Matrix,
    ) -> Tensor:
        x = self._norm(branch, residual, norm, eps)
        rows, width = x.shape[0], weight.shape[0] // 2
        out = self._out("mlp", rows, width, x.dtype)
        if width % PANEL == 0:  # gate and up are whole panels
            self._linear(x, weight, None, out, _GATE)
            return out
        both = self._out("gate_up", rows, 2 * width, x.dtype)
        self._linear(x, weight, None, both, _STORE)
        cpu.silu_and_mul(_DTYPES[x.dtype], both.data_ptr(), out.data_ptr(), rows, 2 * width, width)
        return out

    def norm_qkv_rope_write(
        self,
        branch: Tensor | None,
        residual: Tensor,
        norm: Tensor,
        eps: float,
        weight: Matrix,
        bias: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
    ) -> Tensor:
        x = self._norm(branch, residual, norm, eps)
        num_kv_heads, dim = k_cache.shape[1], cos_sin.shape[1]
        out = self._out("qkv", x.shape[0], weight.shape[0], x.dtype)
        self._linear(x, weight, bias, out, _STORE)
        qkv = out.view(x.shape[0], -1, dim)
        num_heads = qkv.shape[1] - 2 * num_kv_heads
        q, k, v = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if q_norm is not None and k_norm is not None:
            q = self._rms_norm(q, q_norm, eps, self._heads("q", q))
            k = self._rms_norm(k, k_norm, eps, self._heads("k", k))
        self.rope_write(q, k, v, cos_sin, k_cache, v_cache, meta)
        return q

    def _heads(self, name: str, x: Tensor) -> Tensor:
        tokens, heads, dim = x.shape
        return self._out(name, tokens, heads * dim, x.dtype).view(x.shape)

    def _norm(self, branch: Tensor | None, residual: Tensor, norm: Tensor, eps: float) -> Tensor:
        rows, width = residual.shape
        out = self._out("norm", rows, width, residual.dtype)
        if branch is None:
            return self._rms_norm(residual, norm, eps, out)
        return self._add_rms_norm(branch, residual, norm, eps, out)

    def _linear(
        self, x: Tensor, weight: Matrix, bias: Tensor | None, out: Tensor, epilogue: int
    ) -> None:
        packed = _packed(weight)
        (rows, columns), (outputs, k) = x.shape, packed.shape
        assert columns == k and packed.dtype is x.dtype
        assert out.shape == (rows, outputs // 2 if epilogue == _GATE else outputs)
        assert bias is None or (bias.dtype is x.dtype and bias.shape == (outputs,))
        cpu.linear(
            _DTYPES[x.dtype],
            packed.format,
            epilogue,
            x.data_ptr(),
            packed.panels.data_ptr(),
            _address(packed.scales),
            _address(bias),
            out.data_ptr(),
            rows,
            columns,
            outputs,
            packed.group,
            _row_stride(x),
            _row_stride(out),
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        return self._rms_norm(x, weight, eps, out)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        return self._add_rms_norm(x, residual, weight, eps, out)

    def _rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
        rows, inner_rows, dim = x.shape if x.ndim == 3 else (x.shape[0], 1, x.shape[1])
        strides = x.stride()
        assert strides[-1] == 1 and weight.shape == (dim,) and weight.dtype is x.dtype
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

    def _add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> Tensor:
        rows, dim = x.shape
        stride, residual_stride = _row_stride(x), _row_stride(residual)
        assert residual.shape == x.shape and weight.shape == (dim,)
        assert x.dtype is residual.dtype is weight.dtype
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
        out = self._out("attention", tokens, num_heads * head_dim, q.dtype)
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


def _packed(weight: Matrix) -> PackedMatrix:
    assert isinstance(weight, PackedMatrix), "matrices go through pack() first"
    return weight


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


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
