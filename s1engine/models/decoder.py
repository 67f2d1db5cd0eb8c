"""The decoder: one definition for all supported families; ModelConfig holds their differences.

Owns the order of operations of a forward pass. Knows no sequence, no block and no device:
AttentionMetadata says where tokens are, and Ops computes. A layer is five operations, each of which
may be one kernel.

Shapes: T tokens of a step, B rows, H hidden size, Hq/Hkv query/KV heads, D head size, F inner size
of the MLP, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from s1engine.models.collective import Collective
from s1engine.models.model_config import ModelConfig
from s1engine.models.rope import cos_sin_table
from s1engine.ops import AttentionMetadata, DeviceBatchTensors, Matrix, Ops


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """One layer; matrices are [rows out, columns in], as ``Ops.pack`` made them."""

    input_norm: Tensor  # [H]
    qkv: Matrix  # [(Hq + 2 Hkv) D, H]
    qkv_bias: Tensor | None  # [(Hq + 2 Hkv) D]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    o: Matrix  # [H, Hq D]
    o_bias: Tensor | None  # [H]
    post_norm: Tensor  # [H], after attention
    gate_up: Matrix  # [2F, H]
    down: Matrix  # [H, F]


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
        self.cos_sin = cos_sin_table(
            config.head_dim,
            config.rope_theta,
            config.rope_scaling,
            max_positions or config.max_position_embeddings,
        ).to(self.device)
        self._scale: float = config.head_dim**-0.5

    def forward(
        self, input_ids: Tensor, kv: Sequence[tuple[Tensor, Tensor]], meta: AttentionMetadata
    ) -> Tensor:
        """input_ids [T] -> hidden states after the last layer [T, H], not normed. Writes K and V of
        these tokens into ``kv``, the (k_cache, v_cache) of each layer."""
        ops, eps = self.ops, self.config.rms_norm_eps
        residual = self._embed(input_ids)  # [T, H]
        pending_residual: Tensor | None = None  # not yet added to it
        for layer, caches in zip(self.weights.layers, kv, strict=True):
            q = ops.norm_qkv_rope_write(
                pending_residual,
                residual,
                layer.input_norm,
                eps,
                layer.qkv,
                layer.qkv_bias,
                layer.q_norm,
                layer.k_norm,
                self.cos_sin,
                *caches,
                meta,
            )
            x = ops.paged_attention(q, *caches, self._scale, meta)
            pending_residual = self._linear_residual(x, layer.o, layer.o_bias, residual)
            x = ops.norm_gate_up(pending_residual, residual, layer.post_norm, eps, layer.gate_up)
            pending_residual = self._linear_residual(x, layer.down, None, residual)
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
        self, x: Tensor, weight: Matrix, bias: Tensor | None, residual: Tensor
    ) -> Tensor | None:
        """The product that ends attention or MLP. Each rank has a summand of it, so it is
        all-reduced before it is added to the residual."""
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
        assert self._collective is None, "ranks take single steps"
        eps, head = self.config.rms_norm_eps, self._head(vocab_limit)
        self.ops.sample_and_advance(hidden, self.weights.norm, eps, head, run, filtered=filtered)

    def _head(self, vocab_limit: int) -> Matrix:
        assert 0 < vocab_limit <= self.config.vocab_size
        return self.weights.lm_head[:vocab_limit]
