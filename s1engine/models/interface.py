"""What the runner needs of a model, whatever computes it: the native ``Decoder``, or
``TransformersDecoder`` around a module of transformers."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from s1engine.models.model_facts import ModelFacts
from s1engine.ops import AttentionMetadata, Ops


class CausalLM(Protocol):
    """A model ready to run. Immutable: whatever changes between steps is an argument."""

    ops: Ops
    dtype: torch.dtype
    device: torch.device

    @property
    def config(self) -> ModelFacts:
        """The model, or this rank's part of it."""

    def forward(
        self, input_ids: Tensor, kv: Sequence[tuple[Tensor, Tensor]], meta: AttentionMetadata
    ) -> Tensor:
        """input_ids [T] int32 -> hidden states after the last layer [T, H]. Writes K and V of these
        tokens into ``kv``, the (k_cache, v_cache) of each layer."""

    def logits(self, hidden: Tensor, vocab_limit: int) -> Tensor:
        """hidden [B, H] -> float32 [B, vocab_limit]."""
