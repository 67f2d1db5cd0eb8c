"""The operations on the CPU: the kernels of ``csrc/cpu``.

Asserts dtypes and layouts, which the kernels do not check, and passes addresses; a step's metadata
is checked once. Knows no model and no scheduler.

Within ``reusing`` results live in a workspace, and the next call of the same operation overwrites
them. A step then allocates nothing, and steps of equal sizes use the same memory, so that they can
be recorded and replayed without Python.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from s1engine._core import cpu
from s1engine.errors import RequestError
from s1engine.ops import (
    Activation,
    AttentionMetadata,
    Matrix,
    SamplingMetadata,
    kv_quant,
    torch_sampling,
)
from s1engine.ops.layouts import (
    DTYPES,
    cache_sizes,
    check_index,
    check_sampling,
    row_stride,
    token_stride,
)
from s1engine.ops.packed import PANEL, PackedMatrix, pack
from s1engine.ops.quantization import FORMATS, QuantizedMatrix
from s1engine.ops.thread_count import ThreadLease
from s1engine.ops.torch_ops import TorchOps
from s1engine.ops.unfused import Unfused, add_norm
from s1engine.ops.workspace import Workspace

_CACHE_DTYPES = {**DTYPES, torch.int8: 3}
_STORE, _STORE_FLOAT, _ADD, _GATE, _GATE_GELU = range(5)
_GATES = {"silu": _GATE, "gelu_tanh": _GATE_GELU}


class CpuOps(Unfused):
    """``Ops`` for float32, bfloat16 and float16 tensors in main memory, with float32 sums. A
    token's result depends neither on the other tokens of a step nor on the number of threads."""

    name: str = "cpu"

    def __init__(self, num_threads: int | None = None) -> None:
        """``num_threads``: see ThreadLease. Raises RequestError."""
        self._threads = ThreadLease(num_threads)
        self._torch = TorchOps()
        self._checked: AttentionMetadata | None = None
        self.workspace = Workspace()
        self._reuses = False

    def close(self) -> None:
        """Frees the workspace, and ends the threads unless another engine needs them."""
        self.workspace = Workspace()
        self._checked = None
        self._threads.close()

    @contextmanager
    def reusing(self) -> Iterator[None]:
        """Results are valid until the same operation is called again."""
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
        """All shapes are supported; formats and cache dtypes are checked."""
        kv_quant.check_covered(cache_dtype, dtype, "int8", "the CPU")
        if quantization is not None and quantization not in FORMATS:
            raise RequestError(
                f"quantization {quantization} is not for the CPU, which has {', '.join(FORMATS)}",
                param="quantization",
            )

    def pack(self, weight: Tensor | QuantizedMatrix) -> PackedMatrix:
        return pack(weight)

    def embed(self, ids: Tensor, weight: Matrix) -> Tensor:
        return self.embed_shard(ids, weight, 0)

    def embed_shard(self, ids: Tensor, weight: Matrix, first: int) -> Tensor:
        check_index(ids, torch.int32, ids.shape[0])
        if isinstance(weight, Tensor):
            return self._gather_rows("embed", weight, ids, first)
        packed = _packed(weight)
        rows, (outputs, columns) = ids.shape[0], packed.shape
        out = self._out("embed", rows, columns, packed.dtype)
        cpu.embed(
            DTYPES[packed.dtype],
            packed.format,
            ids.data_ptr(),
            packed.panels.data_ptr(),
            _address(packed.scales),
            out.data_ptr(),
            rows,
            columns,
            outputs,
            packed.group,
            first,
        )
        return out

    def gather_rows(self, x: Tensor, index: Tensor) -> Tensor:
        return self._gather_rows("rows", x, index)

    def _gather_rows(self, name: str, x: Tensor, index: Tensor, first: int = 0) -> Tensor:
        check_index(index, torch.int32, index.shape[0])
        assert x.is_contiguous()
        rows, (x_rows, width) = index.shape[0], x.shape
        out = self._out(name, rows, width, x.dtype)
        cpu.gather_rows(
            x.data_ptr(),
            index.data_ptr(),
            out.data_ptr(),
            rows,
            width * x.dtype.itemsize,
            x_rows,
            first,
        )
        return out

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        out = self._out("linear", x.shape[0], weight.shape[0], x.dtype)
        self._linear(x, weight, bias, out, _STORE)
        return out

    def logits(self, hidden: Tensor, norm: Tensor, eps: float, weight: Matrix) -> Tensor:
        x = self.rms_norm(hidden, norm, eps)
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
        pending_residual: Tensor | None,
        residual: Tensor,
        norm: Tensor | None,
        eps: float,
        weight: Matrix,
        activation: Activation = "silu",
    ) -> Tensor:
        rows, width = residual.shape[0], weight.shape[0] // 2
        if width % PANEL:  # gate and up would share a panel
            return super().norm_gate_up(pending_residual, residual, norm, eps, weight, activation)
        x = add_norm(self, pending_residual, residual, norm, eps)
        out = self._out("mlp", rows, width, x.dtype)
        self._linear(x, weight, None, out, _GATES[activation])
        return out

    def _linear(
        self, x: Tensor, weight: Matrix, bias: Tensor | None, out: Tensor, epilogue: int
    ) -> None:
        packed = _packed(weight)
        (rows, columns), (outputs, k) = x.shape, packed.shape
        assert columns == k and packed.dtype is x.dtype
        assert out.shape == (rows, outputs // 2 if epilogue >= _GATE else outputs)
        assert bias is None or (bias.dtype is x.dtype and bias.shape == (outputs,))
        cpu.linear(
            DTYPES[x.dtype],
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
            row_stride(x),
            row_stride(out),
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, inner_rows, dim = x.shape if x.ndim == 3 else (x.shape[0], 1, x.shape[1])
        strides = x.stride()
        assert strides[-1] == 1 and weight.shape == (dim,) and weight.dtype is x.dtype
        # A layer needs the normed heads of q and of k at once; their offsets differ.
        name = "norm" if x.ndim == 2 else f"norm of heads at {x.storage_offset()}"
        out = self._out(name, rows, inner_rows * dim, x.dtype).view(x.shape)
        cpu.rms_norm(
            DTYPES[x.dtype],
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows * inner_rows,
            inner_rows,
            strides[0],
            strides[-2],  # unused for a matrix, which has one inner row
            dim,
            eps,
        )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, dim = x.shape
        out = self._out("norm", rows, dim, x.dtype)
        stride, residual_stride = row_stride(x), row_stride(residual)
        assert residual.shape == x.shape and weight.shape == (dim,)
        assert x.dtype is residual.dtype is weight.dtype
        cpu.add_rms_norm(
            DTYPES[x.dtype],
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

    def norm_residual(self, x: Tensor, norm: Tensor, eps: float, residual: Tensor) -> None:
        rows, dim = x.shape
        assert residual.shape == x.shape and norm.shape == (dim,)
        assert x.dtype is residual.dtype is norm.dtype
        cpu.norm_residual(
            DTYPES[x.dtype],
            x.data_ptr(),
            residual.data_ptr(),
            norm.data_ptr(),
            rows,
            row_stride(x),
            row_stride(residual),
            dim,
            eps,
        )

    def scale_rows(self, x: Tensor, scales: Tensor, positions: Tensor) -> None:
        rows = x.view(x.shape[0], -1)  # heads of a token are contiguous
        check_index(positions, torch.int32, rows.shape[0])
        assert scales.dtype is torch.float32 and scales.is_contiguous()
        cpu.scale_rows(
            DTYPES[x.dtype],
            x.data_ptr(),
            scales.data_ptr(),
            positions.data_ptr(),
            rows.shape[0],
            row_stride(rows),
            rows.shape[1],
        )

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
        num_kv_heads, block_size = cache_sizes(k_cache, v_cache, q)
        assert k.shape == v.shape == (tokens, num_kv_heads, head_dim)
        assert k.dtype is v.dtype is q.dtype and meta.positions.shape[0] == tokens
        assert cos_sin.dtype is torch.float32 and cos_sin.is_contiguous()
        assert cos_sin.shape[1] == head_dim and head_dim % 2 == 0
        cpu.rope_write(
            DTYPES[q.dtype],
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
            token_stride(q),
            token_stride(k),
            token_stride(v),
        )

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        scale: float,
        meta: AttentionMetadata,
        window: int = 0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        self._check(meta)
        tokens, num_heads, head_dim = q.shape
        num_kv_heads, block_size = cache_sizes(k_cache, v_cache, q)
        assert num_heads % num_kv_heads == 0 and meta.positions.shape[0] == tokens
        assert window >= 0 and (sinks is None or sinks.shape == (num_heads,))
        assert sinks is None or (sinks.dtype is torch.float32 and sinks.is_contiguous())
        out = self._out("attention", tokens, num_heads * head_dim, q.dtype)
        cpu.paged_attention(
            DTYPES[q.dtype],
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
            token_stride(q),
            scale,
            window,
            _address(sinks),
        )
        return out

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return self._activate_and_mul(gate_up, cpu.silu_and_mul)

    def gelu_and_mul(self, gate_up: Tensor) -> Tensor:
        return self._activate_and_mul(gate_up, cpu.gelu_and_mul)

    def _activate_and_mul(self, gate_up: Tensor, kernel: Callable[..., None]) -> Tensor:
        rows, dim = gate_up.shape[0], gate_up.shape[1] // 2
        assert gate_up.shape[1] == 2 * dim
        out = self._out("mlp", rows, dim, gate_up.dtype)
        kernel(
            DTYPES[gate_up.dtype],
            gate_up.data_ptr(),
            out.data_ptr(),
            rows,
            row_stride(gate_up),
            dim,
        )
        return out

    def sample(self, logits: Tensor, meta: SamplingMetadata) -> Tensor:
        rows, size = logits.shape
        assert logits.dtype is torch.float32
        check_sampling(meta, rows)
        adjusted = not (meta.bias is None and meta.penalties is None and meta.banned is None)
        if adjusted:  # which also replaces NaN and infinity
            torch_sampling.adjust_logits(logits, meta)
        out = torch.empty(rows, dtype=torch.int64)
        cpu.sample(
            logits.data_ptr(),
            out.data_ptr(),
            rows,
            row_stride(logits),
            size,
            meta.temperature.data_ptr(),
            meta.top_k.data_ptr(),
            meta.top_p.data_ptr(),
            meta.min_p.data_ptr(),
            meta.seeds.data_ptr(),
            meta.positions.data_ptr(),
            meta.filtered,
            adjusted,  # logits_sanitized
        )
        return out

    def logprobs(self, logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._torch.logprobs(logits, token_ids, k)

    def score_rows(
        self, logits: Tensor, token_ids: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, size = logits.shape
        assert logits.dtype is torch.float32 and k <= size
        check_index(token_ids, torch.int64, rows)
        logprobs, top = torch.empty(rows), torch.empty(rows, k)
        ranks = torch.empty(rows, dtype=torch.int32)
        top_ids = torch.empty(rows, k, dtype=torch.int32)
        cpu.score_rows(
            logits.data_ptr(),
            rows,
            row_stride(logits),
            size,
            token_ids.data_ptr(),
            k,
            logprobs.data_ptr(),
            ranks.data_ptr(),
            top.data_ptr(),
            top_ids.data_ptr(),
        )
        return logprobs, ranks, top, top_ids

    def _check(self, meta: AttentionMetadata) -> None:
        if meta is not self._checked:
            rows = meta.context_lens.shape[0]
            check_index(meta.positions, torch.int32, meta.positions.shape[0])
            check_index(meta.slot_mapping, torch.int64, meta.positions.shape[0])
            check_index(meta.cu_seqlens_q, torch.int32, rows + 1)
            check_index(meta.context_lens, torch.int32, rows)
            assert meta.block_table.dtype is torch.int32 and meta.block_table.shape[0] == rows
            assert meta.block_table.stride(1) == 1
            self._checked = meta


def _packed(weight: Matrix) -> PackedMatrix:
    assert isinstance(weight, PackedMatrix), "a matrix must be packed by pack()"
    return weight


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
