"""The decoder: one definition for every supported family, told apart by ModelConfig alone.

Owns the order of operations of a forward pass. Knows no sequence, no block and no device: where
tokens stand is in AttentionMetadata, and how things are computed is up to Ops.

Shapes: T tokens of a step, B rows, H hidden size, Hq/Hkv query/KV heads, D head size, F inner size
of the MLP, V vocabulary. q, k and v are views of one [T, Hq + 2 Hkv, D] buffer unless a norm stands
between, so their heads are contiguous but their tokens may be further apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from s1engine.models.config import ModelConfig
from s1engine.models.rope import cos_sin_table
from s1engine.ops import AttentionMetadata, Ops


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """One layer; matrices are [rows out, columns in]."""

    input_norm: Tensor  # [H]
    qkv: Tensor  # [(Hq + 2 Hkv) D, H]
    qkv_bias: Tensor | None  # [(Hq + 2 Hkv) D]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    o: Tensor  # [H, Hq D]
    o_bias: Tensor | None  # [H]
    post_norm: Tensor  # [H], after attention
    gate_up: Tensor  # [2F, H]
    down: Tensor  # [H, F]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderWeights:
    """A whole model on one device in one type."""

    embed: Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [H]
    lm_head: Tensor  # [V, H], the same tensor as embed if they are tied


class Decoder:
    """A model ready to run. Immutable: all that changes between steps is in the arguments."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        ops: Ops,
        max_positions: int | None = None,
    ) -> None:
        """``max_positions`` bounds the positions that will be asked for; None: the model's own."""
        assert len(weights.layers) == config.num_layers
        self.config = config
        self.weights = weights
        self.ops = ops
        self.dtype = weights.embed.dtype
        self.device = weights.embed.device
        self.cos_sin = cos_sin_table(
            config.head_dim,
            config.rope_theta,
            config.rope_scaling,
            max_positions or config.max_position_embeddings,
        ).to(self.device)
        self._heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self._scale: float = config.head_dim**-0.5

    def forward(
        self, input_ids: Tensor, kv: Sequence[tuple[Tensor, Tensor]], meta: AttentionMetadata
    ) -> Tensor:
        """input_ids [T] -> final hidden states [T, H], normed; writes K and V of these tokens into
        ``kv``, the (k_cache, v_cache) [num_blocks, Hkv, S, D] of each layer."""
        ops, eps = self.ops, self.config.rms_norm_eps
        residual = functional.embedding(input_ids, self.weights.embed)  # [T, H]
        branch: Tensor | None = None  # what the layer before adds to the residual
        for layer, caches in zip(self.weights.layers, kv, strict=True):
            if branch is None:
                x = ops.rms_norm(residual, layer.input_norm, eps)
            else:
                x = ops.add_rms_norm(branch, residual, layer.input_norm, eps)
            x = self._attention(layer, x, caches, meta)
            x = ops.add_rms_norm(x, residual, layer.post_norm, eps)
            branch = ops.linear(ops.silu_and_mul(ops.linear(x, layer.gate_up)), layer.down)
        assert branch is not None
        return ops.add_rms_norm(branch, residual, self.weights.norm, eps)

    def logits(self, hidden: Tensor, vocab_limit: int) -> Tensor:
        """hidden [B, H] -> float32 [B, vocab_limit]; padding rows of the head are not computed."""
        assert 0 < vocab_limit <= self.config.vocab_size
        return self.ops.linear(hidden, self.weights.lm_head[:vocab_limit]).to(torch.float32)

    def _attention(
        self, layer: LayerWeights, x: Tensor, caches: tuple[Tensor, Tensor], meta: AttentionMetadata
    ) -> Tensor:
        ops = self.ops
        qkv = ops.linear(x, layer.qkv, layer.qkv_bias)
        q, k, v = torch.split(qkv.view(x.shape[0], -1, self.config.head_dim), self._heads, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = ops.rms_norm(q, layer.q_norm, self.config.rms_norm_eps)
            k = ops.rms_norm(k, layer.k_norm, self.config.rms_norm_eps)
        ops.rope_write(q, k, v, self.cos_sin, *caches, meta)
        context = ops.paged_attention(q, *caches, self._scale, meta)
        return ops.linear(context, layer.o, layer.o_bias)
