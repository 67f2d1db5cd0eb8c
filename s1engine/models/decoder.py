"""The decoder: one definition for all supported families; ModelConfig holds their differences.

Owns the order of operations of a forward pass. Knows no sequence, no block and no device:
AttentionMetadata says where tokens are, and Ops computes. A layer is five operations, each of which
may be one kernel.

Shapes: T tokens of a step, B rows, H hidden size, Hq/Hkv query/KV heads, D head size, F inner size
of the MLP, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s1engine.models.collective import Collective
from s1engine.models.model_config import ModelConfig
from s1engine.models.rope_table import cos_sin_table
from s1engine.ops import AttentionMetadata, DeviceBatchTensors, Matrix, Ops, torch_sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """One layer; matrices are [rows out, columns in], as ``Ops.pack`` made them."""

    input_norm: Tensor | None = None  # [H]
    qkv: Matrix  # [(Hq + 2 Hkv) D, H]
    qkv_bias: Tensor | None  # [(Hq + 2 Hkv) D]
    q_norm: Tensor | None  # [D] or [Hq D]
    k_norm: Tensor | None  # [D] or [Hkv D]
    sinks: Tensor | None  # [Hq] float32
    o: Matrix  # [H, Hq D]
    o_bias: Tensor | None  # [H]
    attention_out_norm: Tensor | None = None  # [H]
    mlp_norm: Tensor | None = None  # [H]
    gate_up: Matrix  # [2F, H]
    down: Matrix  # [H, F]
    mlp_out_norm: Tensor | None = None  # [H]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderWeights:
    """A model, or one rank's part of it, on one device in one dtype."""

    embed: Matrix  # [V, H]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [H]
    lm_head: Matrix  # [V, H], the same as embed if they are tied


class Decoder:
    """A model ready to run. Immutable: whatever changes between steps is an argument."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        ops: Ops,
        max_positions: int | None = None,
        collective: Collective | None = None,
    ) -> None:
        """``max_positions`` bounds the positions of all steps; None: the model's own bound.
        ``collective``: config and weights are one rank's part of a model (models/shard.py)."""
        assert len(weights.layers) == config.num_layers
        self.config = config
        self.weights = weights
        self.ops = ops
        self._collective = collective
        self.dtype = weights.norm.dtype
        self.device = weights.norm.device
        length = max_positions or config.max_position_embeddings
        self.cos_sin = self._cos_sin(length)
        self._embed_scales = self._per_position(torch.full((length,), config.embed_scale))
        self._query_scales = self._per_position(_query_scales(config, length))
        self._scale: float = config.attention_scale or config.head_dim**-0.5

    def _cos_sin(self, length: int) -> tuple[Tensor, ...]:
        """Each layer's table of cosines and sines; equal layers share one."""
        config = self.config
        ropes = [config.layer_rope(layer) for layer in range(config.num_layers)]
        tables: list[Tensor] = []
        for layer, rope in enumerate(ropes):
            first = ropes.index(rope)
            known = first < layer
            table = tables[first] if known else cos_sin_table(config.head_dim, rope, length)
            tables.append(table.to(self.device))
        return tuple(tables)

    def _per_position(self, scales: Tensor) -> Tensor | None:
        """Factors of the positions [length] as the model's dtype rounds them, float32; None: they
        change nothing."""
        scales = scales.to(self.dtype).to(torch.float32)
        return None if bool((scales == 1).all()) else scales.to(self.device)

    def forward(
        self, input_ids: Tensor, kv: Sequence[tuple[Tensor, Tensor]], meta: AttentionMetadata
    ) -> Tensor:
        """input_ids [T] -> hidden states after the last layer [T, H], not normed. Writes K and V of
        these tokens into ``kv``, the (k_cache, v_cache) of each layer."""
        ops, eps, activation = self.ops, self.config.rms_norm_eps, self.config.activation
        residual = self._embed(input_ids)  # [T, H]
        if self._embed_scales is not None:
            ops.scale_rows(residual, self._embed_scales, meta.positions)
        pending_residual: Tensor | None = None  # not yet added to it
        windows = self.config.layer_windows
        layers = zip(self.weights.layers, self.cos_sin, windows, kv, strict=True)
        for layer, cos_sin, window, caches in layers:
            q = ops.norm_qkv_rope_write(
                pending_residual,
                residual,
                layer.input_norm,
                eps,
                layer.qkv,
                layer.qkv_bias,
                layer.q_norm,
                layer.k_norm,
                cos_sin,
                *caches,
                meta,
            )
            if self._query_scales is not None:
                ops.scale_rows(q, self._query_scales, meta.positions)
            x = ops.paged_attention(q, *caches, self._scale, meta, window, layer.sinks)
            pending_residual = self._linear_residual(
                x, layer.o, layer.o_bias, layer.attention_out_norm, residual
            )
            x = ops.norm_gate_up(
                pending_residual, residual, layer.mlp_norm, eps, layer.gate_up, activation
            )
            pending_residual = self._linear_residual(
                x, layer.down, None, layer.mlp_out_norm, residual
            )
        return residual if pending_residual is None else residual.add_(pending_residual)

    def _embed(self, input_ids: Tensor) -> Tensor:
        """Each rank embeds the ids it holds and zeros for the others; the sum is complete."""
        if self._collective is None:
            return self.ops.embed(input_ids, self.weights.embed)
        first = self._collective.shard.rank * self.config.vocab_size
        return self._collective.all_reduce(
            self.ops.embed_shard(input_ids, self.weights.embed, first)
        )

    def _linear_residual(
        self,
        x: Tensor,
        weight: Matrix,
        bias: Tensor | None,
        norm: Tensor | None,
        residual: Tensor,
    ) -> Tensor | None:
        """The product that ends attention or MLP, normed if there is a norm. Each rank has a
        summand of it, so it is all-reduced before it is normed or added to the residual."""
        if norm is not None:
            product = self.ops.linear(x, weight, bias)
            if self._collective is not None:
                product = self._collective.all_reduce(product)
            self.ops.norm_residual(product, norm, self.config.rms_norm_eps, residual)
            return None
        if self._collective is None:
            return self.ops.linear_residual(x, weight, bias, residual)
        return self._collective.all_reduce_residual(self.ops.linear(x, weight, bias), residual)

    def logits(self, hidden: Tensor, vocab_limit: int) -> Tensor:
        """hidden [B, H] -> float32 [B, vocab_limit]; padding rows of the head are not computed. If
        ranks share the head, rank 0 gets all logits, the others their own part."""
        if self._collective is None:
            return self._own_logits(hidden, vocab_limit)
        own = self._own_logits(hidden, self.config.vocab_size)
        return self._collective.gather(own)[:, :vocab_limit]

    def _own_logits(self, hidden: Tensor, vocab_limit: int) -> Tensor:
        eps, head = self.config.rms_norm_eps, self._head(vocab_limit)
        return self.ops.logits(hidden, self.weights.norm, eps, head)

    def sample_and_advance(
        self, hidden: Tensor, vocab_limit: int, run: DeviceBatchTensors, *, filtered: bool
    ) -> None:
        """``Ops.sample_and_advance`` on hidden [B, H] of the rows of a device batch."""
        ops, norm, eps = self.ops, self.weights.norm, self.config.rms_norm_eps
        if self._collective is None:
            head = self._head(vocab_limit)
            ops.sample_and_advance(hidden, norm, eps, head, run, filtered=filtered)
            return
        candidates = None
        if not filtered and run.ends is None:
            candidates = self._candidates(hidden, vocab_limit, run)
        if candidates is not None:
            sampled = torch_sampling.best_of_shards(self._collective.all_gather(candidates))
        else:  # filters rank all logits, so every rank filters all of them, alike
            own = self._own_logits(hidden, self.config.vocab_size)
            logits = self._collective.all_gather(own)[:, :vocab_limit]
            sampled = ops.sample_rows(logits, run, filtered=filtered)
        ops.advance(sampled, run)

    def _candidates(
        self, hidden: Tensor, vocab_limit: int, run: DeviceBatchTensors
    ) -> Tensor | None:
        """This rank's ``Ops.best_of_shard``, whose score is -infinity if it holds no id below
        ``vocab_limit``."""
        assert self._collective is not None
        own = self.config.vocab_size
        first = self._collective.shard.rank * own
        limit = min(max(vocab_limit - first, 0), own)
        candidates = self.ops.best_of_shard(
            hidden, self.weights.norm, self.config.rms_norm_eps, self.weights.lm_head, run, first,
            max(limit, 1),
        )  # fmt: skip
        if candidates is not None and limit == 0:
            candidates.fill_(-torch.inf)
        return candidates

    def _head(self, vocab_limit: int) -> Matrix:
        assert 0 < vocab_limit <= self.config.vocab_size
        return self.weights.lm_head[:vocab_limit]


def _query_scales(config: ModelConfig, length: int) -> Tensor:
    """Factor of the queries at each position, [length]."""
    if config.query_growth is None:
        return torch.ones(length)
    beta, original = config.query_growth
    return 1 + beta * torch.log(1 + torch.floor(torch.arange(length) / original))
