"""The operations of ``Ops`` that span part of a layer, composed of single operations.

This defines them. A device inherits it and overrides what one kernel computes faster; where that
kernel does not fit, it calls this.
"""

import torch
from torch import Tensor

from s1engine.ops import (
    Activation,
    AttentionMetadata,
    DeviceBatchTensors,
    Matrix,
    Ops,
    torch_sampling,
)
from s1engine.ops.torch_budget import budget_step, sampling_metadata


class Unfused:
    """Base of classes that implement the other operations of ``Ops``."""

    def embed_shard(self: Ops, ids: Tensor, weight: Matrix, first: int) -> Tensor:
        own = ids - first
        outside = (own < 0) | (own >= weight.shape[0])
        return self.embed(own.masked_fill(outside, 0), weight).masked_fill_(outside[:, None], 0)

    def norm_qkv_rope_write(
        self: Ops,
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
        x = add_norm(self, pending_residual, residual, norm, eps)
        q, k, v = split_heads(self.linear(x, weight, bias), k_cache.shape[1], cos_sin.shape[1])
        if q_norm is not None and k_norm is not None:
            q = norm_heads(self, q, q_norm, eps)
            k = norm_heads(self, k, k_norm, eps)
        self.rope_write(q, k, v, cos_sin, k_cache, v_cache, meta)
        return q

    def linear_residual(
        self: Ops, x: Tensor, weight: Matrix, bias: Tensor | None, residual: Tensor
    ) -> Tensor | None:
        return self.linear(x, weight, bias)

    def logits(self: Ops, hidden: Tensor, norm: Tensor, eps: float, weight: Matrix) -> Tensor:
        return self.linear(self.rms_norm(hidden, norm, eps), weight).to(torch.float32)

    def norm_gate_up(
        self: Ops,
        pending_residual: Tensor | None,
        residual: Tensor,
        norm: Tensor | None,
        eps: float,
        weight: Matrix,
        activation: Activation = "silu",
    ) -> Tensor:
        gate_up = self.linear(add_norm(self, pending_residual, residual, norm, eps), weight)
        return self.gelu_and_mul(gate_up) if activation != "silu" else self.silu_and_mul(gate_up)

    def norm_residual(self: Ops, x: Tensor, norm: Tensor, eps: float, residual: Tensor) -> None:
        residual.add_(self.rms_norm(x, norm, eps))

    def scale_rows(self: Ops, x: Tensor, scales: Tensor, positions: Tensor) -> None:
        x.mul_(scales[positions].to(x.dtype).view(-1, *[1] * (x.ndim - 1)))

    def sample_and_advance(
        self: Ops,
        hidden: Tensor,
        norm: Tensor,
        eps: float,
        weight: Matrix,
        batch: DeviceBatchTensors,
        *,
        filtered: bool,
    ) -> None:
        logits = self.logits(hidden, norm, eps, weight)
        self.advance(self.sample_rows(logits, batch, filtered=filtered), batch)

    def sample_rows(
        self: Ops, logits: Tensor, batch: DeviceBatchTensors, *, filtered: bool
    ) -> Tensor:
        return self.sample(logits, sampling_metadata(batch, filtered))

    def advance(self: Ops, sampled: Tensor, batch: DeviceBatchTensors) -> None:
        budget_step(sampled, batch)

    def best_of_shard(
        self: Ops,
        hidden: Tensor,
        norm: Tensor,
        eps: float,
        weight: Matrix,
        batch: DeviceBatchTensors,
        first: int,
        limit: int,
    ) -> Tensor | None:
        logits = self.logits(hidden, norm, eps, weight[:limit])
        return torch_sampling.best_of_shard(logits, sampling_metadata(batch, False), first)


def add_norm(
    ops: Ops, pending_residual: Tensor | None, residual: Tensor, norm: Tensor | None, eps: float
) -> Tensor:
    """residual += pending_residual if there is one, then rms_norm(residual) if there is a norm."""
    if norm is None:
        return residual if pending_residual is None else residual.add_(pending_residual)
    if pending_residual is None:
        return ops.rms_norm(residual, norm, eps)
    return ops.add_rms_norm(pending_residual, residual, norm, eps)


def norm_heads(ops: Ops, x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """x [T, heads, D], normed over D or over all heads at once: over the width of ``norm``."""
    return ops.rms_norm(x.view(x.shape[0], -1, norm.shape[0]), norm, eps).view(x.shape)


def split_heads(qkv: Tensor, num_kv_heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (Hq + 2 Hkv) D] -> views q [T, Hq, D], k and v [T, Hkv, D]."""
    heads = qkv.view(qkv.shape[0], -1, dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    return q, k, v
