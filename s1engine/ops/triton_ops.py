"""The operations on a CUDA device: the Triton kernels of ``kernels/``, and cuBLAS's products.

Steps of few tokens run fused, five kernels a layer; shapes alone decide which steps do.

Rejects what the kernels do not cover, and owns the workspaces in which they add partial results.
The only module that imports ``s1engine.kernels``. Knows no model and no scheduler.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from s1engine.errors import RequestError
from s1engine.kernels import launch_table
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
from s1engine.kernels.silu_and_mul import gelu_and_mul, silu_and_mul
from s1engine.ops import (
    Activation,
    AttentionMetadata,
    DeviceBatchTensors,
    Matrix,
    SamplingMetadata,
    kv_quant,
    torch_sampling,
)
from s1engine.ops.fp8_linear import fp8_linear
from s1engine.ops.quantization import FP8, QuantizedMatrix
from s1engine.ops.torch_end_markers import end_ids
from s1engine.ops.torch_ops import TorchOps
from s1engine.ops.unfused import Unfused

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_CAPABILITY = (8, 9)  # older devices cannot convert to and from e4m3


class TritonOps(Unfused):
    """``Ops`` for float32, bfloat16 and float16 tensors on one device; sums are in float32."""

    name: str = "triton"

    def __init__(self) -> None:
        self._torch = TorchOps()
        self._outgrown: list[Tensor] = []  # kept: a captured graph may still write there
        self._decode_partials: Tensor | None = None  # float32, of decode attention's splits
        self._decode_arrivals: Tensor | None = None  # int32, zeros between launches
        self._split_k: tuple[Tensor, Tensor] | None = None  # the same two for skinny_gemm

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
        _check_shapes(head_dim, num_heads, num_kv_heads, block_size, dtype)
        _require(quantization in (None, FP8), f"quantization {quantization}", FP8, "quantization")
        kv_quant.check_covered(cache_dtype, dtype, "fp8", "CUDA")
        if cache_dtype is torch.float8_e4m3fn:
            _check_fp8("kv_cache_dtype")
        if quantization == FP8:
            _check_fp8("quantization")

    def pack(self, weight: Tensor | QuantizedMatrix) -> Matrix:
        assert isinstance(weight, Tensor) or weight.format == FP8  # see check_model
        return weight

    def embed(self, ids: Tensor, weight: Matrix) -> Tensor:
        return self._torch.embed(ids, weight)

    def gather_rows(self, x: Tensor, index: Tensor) -> Tensor:
        return self._torch.gather_rows(x, index)

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        values, scale = _values(weight)
        if launch_table.fits_skinny_gemm(x.shape[0], *values.shape):
            return linear(x, values, bias, self._split_k_workspace(x.device), scale=scale)
        if isinstance(weight, QuantizedMatrix):
            return fp8_linear(x, weight, bias)
        return functional.linear(x, values, bias)

    def linear_residual(
        self, x: Tensor, weight: Matrix, bias: Tensor | None, residual: Tensor
    ) -> Tensor | None:
        values, scale = _values(weight)
        if not launch_table.fits_skinny_gemm(x.shape[0], *values.shape):
            return super().linear_residual(x, weight, bias, residual)
        linear(x, values, bias, self._split_k_workspace(x.device), residual, scale)
        return None

    def norm_qkv_rope_write(
        self,
        pending_residual: Tensor | None,
        residual: Tensor,
        norm: Tensor | None,
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
        values, scale = _values(weight)
        fits = launch_table.fits_skinny_gemm(residual.shape[0], *values.shape)
        if norm is None or pending_residual is not None or q_norm is not None or not fits:
            return super().norm_qkv_rope_write(
                pending_residual, residual, norm, eps, weight, bias, q_norm, k_norm,
                cos_sin, k_cache, v_cache, meta,
            )  # fmt: skip
        return norm_qkv_rope_write(
            residual, norm, eps, values, bias, cos_sin, k_cache, v_cache,
            meta.positions, meta.slot_mapping, self._split_k_workspace(residual.device), scale,
        )  # fmt: skip

    def norm_gate_up(
        self,
        pending_residual: Tensor | None,
        residual: Tensor,
        norm: Tensor | None,
        eps: float,
        weight: Matrix,
        activation: Activation = "silu",
    ) -> Tensor:
        values, scale = _values(weight)
        fits = launch_table.fits_skinny_gemm(residual.shape[0], *values.shape)
        if norm is None or pending_residual is not None or not fits:
            return super().norm_gate_up(pending_residual, residual, norm, eps, weight, activation)
        workspace = self._split_k_workspace(residual.device)
        return norm_gate_up(residual, norm, eps, values, workspace, scale, activation)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps, residual)

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
        _check_shapes(*q.shape[:0:-1], *k_cache.shape[1:3], q.dtype)
        rope_write(q, k, v, cos_sin, k_cache, v_cache, meta.positions, meta.slot_mapping)

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
        """Rows of one token at the beginning run paged_decode, which splits their contexts, the
        others paged_prefill."""
        _check_shapes(*q.shape[:0:-1], *k_cache.shape[1:3], q.dtype)
        rows, num_heads = meta.context_lens.shape[0], q.shape[1]
        decoding = meta.num_decode_rows
        if meta.max_seqlen_q == 1 and q.shape[0] == rows:
            decoding = rows
        out = torch.empty((q.shape[0], num_heads * q.shape[2]), dtype=q.dtype, device=q.device)
        if decoding:
            part = q[:decoding]
            workspace = self._decode_workspace(part, k_cache.shape[1])
            paged_decode(
                part, k_cache, v_cache, meta.block_table[:decoding], meta.context_lens[:decoding],
                scale, *workspace, window=window, sinks=sinks, out=out[:decoding],
            )  # fmt: skip
        if decoding == rows:
            return out
        if rows - decoding > launch_table.MAX_BATCH_ROWS:
            raise RequestError(
                f"{rows} sequences in a step: the kernels cover {launch_table.MAX_BATCH_ROWS}",
                param="max_num_seqs",
            )
        return paged_prefill(
            q, k_cache, v_cache, meta.block_table, meta.cu_seqlens_q, meta.context_lens,
            meta.max_seqlen_q, scale, window, sinks, num_decode_rows=decoding, out=out,
        )  # fmt: skip

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return silu_and_mul(gate_up)

    def gelu_and_mul(self, gate_up: Tensor) -> Tensor:
        return gelu_and_mul(gate_up)

    def sample(self, logits: Tensor, meta: SamplingMetadata) -> Tensor:
        adjusts = not (meta.bias is None and meta.penalties is None and meta.banned is None)
        if adjusts:
            torch_sampling.adjust_logits(logits, meta)
        return sample(
            logits, meta.temperature, meta.top_k, meta.top_p, meta.min_p, meta.seeds,
            meta.positions, filtered=meta.filtered, logits_sanitized=adjusts,
        )  # fmt: skip

    def sample_and_advance(
        self,
        hidden: Tensor,
        norm: Tensor,
        eps: float,
        weight: Matrix,
        batch: DeviceBatchTensors,
        *,
        filtered: bool,
    ) -> None:
        assert isinstance(weight, Tensor)  # HEAD_FORMATS
        fused = launch_table.fits_skinny_gemm(hidden.shape[0], *weight.shape)
        if filtered or batch.ends is not None or not fused:
            logits = self.logits(hidden, norm, eps, weight)
            sampled = self.sample_rows(logits, batch, filtered=filtered)
        else:
            sampled = norm_head_sample(
                hidden, norm, eps, weight, batch.temperature, batch.seeds, batch.sample_positions,
                **_bans(batch),
            )  # fmt: skip
        self.advance(sampled, batch)

    def sample_rows(self, logits: Tensor, batch: DeviceBatchTensors, *, filtered: bool) -> Tensor:
        bans = {} if batch.ends is not None else _bans(batch)
        if batch.ends is not None:  # what is banned depends on the row's state
            torch_sampling.sanitize_logits(logits).masked_fill_(end_ids(batch), float("-inf"))
        return sample(
            logits, batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seeds,
            batch.sample_positions, filtered=filtered, logits_sanitized=not bans, **bans,
        )  # fmt: skip

    def best_of_shard(
        self,
        hidden: Tensor,
        norm: Tensor,
        eps: float,
        weight: Matrix,
        batch: DeviceBatchTensors,
        first: int,
        limit: int,
    ) -> Tensor | None:
        assert isinstance(weight, Tensor)  # HEAD_FORMATS
        if not launch_table.fits_skinny_gemm(hidden.shape[0], *weight.shape):
            return None
        return best_of_shard(
            hidden, norm, eps, weight[:limit], batch.temperature, batch.seeds,
            batch.sample_positions, first, **_bans(batch),
        )  # fmt: skip

    def advance(self, sampled: Tensor, batch: DeviceBatchTensors) -> None:
        ends = batch.ends
        budget_step(
            sampled, batch.fields, batch.phrases, batch.triggers, batch.newlines,
            batch.block_table, slot_mapping=batch.slot_mapping,
            sample_positions=batch.sample_positions, output_tokens=batch.output_tokens,
            step_counter=batch.step_counter, block_size=batch.block_size,
            null_slot=batch.null_slot,
            markers=None if ends is None else (ends.next_state, ends.depths, ends.token_lens),
        )  # fmt: skip

    def logprobs(self, logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._torch.logprobs(logits, token_ids, k)

    def score_rows(
        self, logits: Tensor, token_ids: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._torch.score_rows(logits, token_ids, k)

    def _split_k_workspace(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Workspace of any skinny_gemm launch; allocated in the first step, which runs eagerly."""
        if self._split_k is None or self._split_k[0].device != device:
            floats, counters = launch_table.SPLIT_K_WORKSPACE
            partials = torch.empty(floats, dtype=torch.float32, device=device)
            self._split_k = partials, torch.zeros(counters, dtype=torch.int32, device=device)
        return self._split_k

    def _decode_workspace(self, q: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor]:
        """Workspace of decode attention. It grows when a step needs more. A graph's step runs once
        before its capture, so a graph's addresses stay valid."""
        rows, num_heads, dim = q.shape
        floats, counters = workspace_sizes(rows, num_kv_heads, dim, num_heads // num_kv_heads)
        if not _holds(self._decode_partials, floats, q.device):
            self._outgrown += [] if self._decode_partials is None else [self._decode_partials]
            self._decode_partials = torch.empty(floats, dtype=torch.float32, device=q.device)
        if not _holds(self._decode_arrivals, counters, q.device):
            self._outgrown += [] if self._decode_arrivals is None else [self._decode_arrivals]
            self._decode_arrivals = torch.zeros(counters, dtype=torch.int32, device=q.device)
        assert self._decode_partials is not None and self._decode_arrivals is not None
        return self._decode_partials, self._decode_arrivals


def _bans(batch: DeviceBatchTensors) -> dict[str, Tensor]:
    """Arguments of the sampling kernels."""
    return {"banned": batch.field("sample_banned"), "triggers": batch.triggers}


def _holds(buffer: Tensor | None, size: int, device: torch.device) -> bool:
    return buffer is not None and buffer.numel() >= size and buffer.device == device


def _values(weight: Matrix) -> tuple[Tensor, Tensor | None]:
    """What the kernels read: the weight, or its e4m3 values and the scale of each row."""
    if isinstance(weight, QuantizedMatrix):
        return weight.values, weight.scales
    assert isinstance(weight, Tensor)
    return weight, None


def _check_fp8(param: str) -> None:
    if torch.cuda.is_available():
        _require(
            torch.cuda.get_device_capability() >= FP8_CAPABILITY,
            f"{param} fp8 of {torch.cuda.get_device_name()}",
            "devices of compute capability 8.9 and above",
            param,
        )


@lru_cache
def _check_shapes(
    head_dim: int, num_heads: int, num_kv_heads: int, block_size: int, dtype: torch.dtype
) -> None:
    """Raises RequestError, with a list of what is covered."""
    head_dims, block_sizes = launch_table.HEAD_DIMS, launch_table.BLOCK_SIZES
    group = num_heads // num_kv_heads
    names = [str(covered).removeprefix("torch.") for covered in DTYPES]
    _require(dtype in DTYPES, f"dtype {dtype}", ", ".join(names), "dtype")
    _require(head_dim in head_dims, f"head size {head_dim}", ", ".join(map(str, head_dims)))
    _require(
        block_size in block_sizes,
        f"block_size {block_size}",
        ", ".join(map(str, block_sizes)),
        "block_size",
    )
    _require(
        num_heads % num_kv_heads == 0 and group <= launch_table.MAX_GROUP,
        f"{num_heads} query heads on {num_kv_heads} KV heads",
        f"up to {launch_table.MAX_GROUP} on each",
    )
    widest, largest = launch_table.MAX_FLOAT32
    _require(
        dtype is not torch.float32 or (head_dim <= widest and group <= largest),
        f"dtype float32 with head size {head_dim} and {group} query heads on each KV head",
        f"head sizes up to {widest} and up to {largest} on each; bfloat16 and float16 beyond",
        "dtype",
    )


def _require(covered: bool, what: str, covers: str, param: str | None = None) -> None:
    if not covered:
        raise RequestError(f"{what} is not covered on CUDA; covered: {covers}", param=param)
