"""A model that transformers computes, with our attention: ``--model-impl transformers``.

Owns the module. Its attention writes to and reads from our paged KV cache (paged_interface.py); all
else (norms, rotations, experts, head) is transformers' own code, as it stands. Steps run call by
call: nothing is recorded or captured.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from s1engine.models.paged_interface import PAGED, STEP, AttentionCall, PagedStep
from s1engine.models.transformers_config import TransformersConfig
from s1engine.ops import AttentionMetadata, Ops


class TransformersDecoder:
    """A ``CausalLM`` around a module of transformers.

    Args:
        config: with the shapes of ``calls``: ``head_dim`` is the row of the caches.
        module: a causal language model on its device; its base model is taken out of it.
        calls: the attention calls of a forward pass, in order.
    """

    def __init__(
        self, config: TransformersConfig, module: Any, ops: Ops, calls: Sequence[AttentionCall]
    ) -> None:
        assert len(calls) == config.num_layers
        self.config = config
        self.ops = ops
        self.dtype: torch.dtype = module.dtype
        self.device: torch.device = module.device
        self._calls = tuple(calls)
        self._identity = _identity_rotation(config.head_dim).to(self.device)
        module.set_attn_implementation(PAGED)
        self._base = module.base_model
        self._head = module
        setattr(module, module.base_model_prefix, _GivenHiddenStates())

    def forward(
        self, input_ids: Tensor, kv: Sequence[tuple[Tensor, Tensor]], meta: AttentionMetadata
    ) -> Tensor:
        """input_ids [T] -> the base model's last hidden state [T, H]. See CausalLM."""
        step = PagedStep(self._calls, kv, meta, self.ops, self._identity)
        outputs = self._base(
            input_ids=input_ids[None].long(),
            position_ids=meta.positions[None].long(),
            use_cache=False,
            **{STEP: step},
        )
        assert step.is_complete()
        hidden: Tensor = outputs.last_hidden_state[0]
        return hidden.contiguous()

    def logits(self, hidden: Tensor, vocab_limit: int) -> Tensor:
        """hidden [B, H] -> float32 [B, vocab_limit], by the module's own head, scales and caps."""
        outputs = self._head(inputs_embeds=hidden[None], use_cache=False)
        logits: Tensor = outputs.logits[0, :, :vocab_limit]
        return logits.to(torch.float32)


class _GivenHiddenStates(nn.Module):
    """In place of the base model: what it gets as embeddings are the last hidden states. So the
    causal model's forward computes its head alone."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> "_LastHiddenState":
        return _LastHiddenState(inputs_embeds)


class _LastHiddenState:
    """Outputs of a base model; all but the hidden state is None."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _identity_rotation(dim: int) -> Tensor:
    """[1, dim] float32: the cosines and sines of ``Ops.rope_write`` for angles of 0."""
    return torch.cat((torch.ones(1, dim // 2), torch.zeros(1, dim // 2)), dim=1)
