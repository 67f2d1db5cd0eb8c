"""Our paged attention as an attention function of transformers.

A step reaches the function as a keyword argument of the model's forward pass, so there is no state
between steps. ``AttentionTrace`` takes the place of a step once, at load: it learns the shapes and
windows of all attention calls, and refuses what paged attention would compute differently.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from s1engine.errors import ModelError
from s1engine.ops import AttentionMetadata, Ops

STEP = "s1engine_step"
"""Keyword argument that carries a step or a trace to the attention function."""
PAGED, TRACED = "s1engine_paged", "s1engine_traced"
"""Names of the function in transformers' registry: without masks, and with windows for masks."""

# Keyword arguments that change no result: they repeat what the step knows, or ask for outputs.
NEUTRAL = {"dropout", "is_causal", "position_ids", "cache_position", "use_cache"}
_WINDOW_TAG = 2**40  # a mask of ours holds the tag plus the window
_PAST_QUERY = 8  # keys after the last query that are tested to be masked


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention of a forward pass; the n-th call uses the n-th KV cache."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int


class AttentionStep(Protocol):
    """What computes the attention calls of one forward pass."""

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """q [1, Hq, T, D], k [1, Hkv, T, D], v [1, Hkv, T, Dv] -> [1, T, Hq, Dv]."""


class PagedStep:
    """Attention of one step over the caches ``kv``.

    Heads that are narrower than the caches' rows get zeros, which change no product; KV heads of
    layers that have fewer are repeated.
    """

    def __init__(
        self, calls: Sequence[AttentionCall], kv: Sequence[tuple[Tensor, Tensor]],
        meta: AttentionMetadata, ops: Ops, identity: Tensor,
    ) -> None:  # fmt: skip
        """``identity`` [1, D]: cosines and sines of angle 0, since the module has rotated."""
        self._calls = iter(zip(calls, kv, strict=True))
        self._meta = replace(meta, positions=torch.zeros_like(meta.positions))
        self._ops = ops
        self._identity = identity

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
        scaling: float | None, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        call, (k_cache, v_cache) = next(self._calls)
        scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
        dim = self._identity.shape[1]
        q, k, v = (_token_major(x, dim) for x in (q, k, v))
        if (repeats := k_cache.shape[1] // call.num_kv_heads) > 1:
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        self._ops.rope_write(q, k, v, self._identity, k_cache, v_cache, self._meta)
        x = self._ops.paged_attention(
            q, k_cache, v_cache, scale, self._meta, window=call.window,
            sinks=None if sinks is None else sinks.float().contiguous(),
        )  # fmt: skip
        return x.view(1, *q.shape)[..., : call.value_dim]

    def is_complete(self) -> bool:
        """Has every layer attended?"""
        return next(self._calls, None) is None


class AttentionTrace:
    """Collects the attention calls of one forward pass and answers them with zeros."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
        scaling: float | None, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        name = type(module).__name__
        if q.shape[0] != 1 or k.shape[2] != q.shape[2] or v.shape[:3] != k.shape[:3]:
            shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
            raise ModelError(f"{name}: queries, keys and values have shapes {shapes}")
        if q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
            raise ModelError(f"{name}: {q.shape[1]} query heads on {k.shape[1]} KV heads")
        window = marked_window(mask)
        if window is None:
            raise ModelError(f"{name}: its mask is not causal with or without a sliding window")
        self.calls.append(AttentionCall(q.shape[1], k.shape[1], k.shape[3], v.shape[3], window))
        return v.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])


def _token_major(x: Tensor, dim: int) -> Tensor:
    """x [1, heads, T, n] -> [T, heads, dim] of its own memory, filled up with zeros."""
    x = x[0].transpose(0, 1)
    if x.shape[-1] < dim:
        return functional.pad(x, (0, dim - x.shape[-1]))
    return x.clone(memory_format=torch.contiguous_format)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls for every attention. Raises ModelError for an argument
    that would change the result."""
    step: AttentionStep | None = others.pop(STEP, None)
    name = type(module).__name__
    if step is None:
        raise ModelError(f"{name}: keyword arguments of the model do not reach its attention")
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ModelError(f"{name}: attention is not causal")
    others.pop("sliding_window", None)  # the mask decides: see window_mask
    for key_name, given in others.items():
        if key_name not in NEUTRAL and not key_name.startswith("output_") and given is not None:
            raise ModelError(f"{name}: paged attention has no {key_name}")
    x = step.attend(module, query, key, value, attention_mask, scaling, s_aux)
    return x, None


def window_mask(*, mask_function: Any, config: Any, device: Any = "cpu", **others: Any) -> Tensor:
    """In place of a mask, [1, 1, 1, 1] int64: _WINDOW_TAG plus the window that ``mask_function``
    allows, 0 for plain causal attention; or 0 for any other pattern.

    ``mask_function(batch, head, query, key)`` is evaluated at positions up to the model's last one.
    """
    last = getattr(config, "max_position_embeddings", None) or 2**17
    keys = torch.arange(last + _PAST_QUERY, device=device)
    hidden = int(_visible(mask_function, last - 1, keys).int().argmax())  # keys before the window
    window = last - hidden if hidden else 0
    for query in {0, 1, last // 3, last // 2, last - 2, last - 1}:
        allowed = (keys <= query) & (keys > query - (window or last))
        if not torch.equal(_visible(mask_function, query, keys), allowed):
            return _mark(0, device)
    return _mark(_WINDOW_TAG + window, device)


def _visible(mask_function: Any, query: int, keys: Tensor) -> Tensor:
    """Which of the keys a query sees; bool."""
    zero = keys.new_zeros(())
    visible = mask_function(zero, zero, keys.new_tensor(query), keys)
    return torch.as_tensor(visible, device=keys.device).expand(keys.shape)


def _mark(value: int, device: Any) -> Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.int64, device=device)


def marked_window(mask: Any) -> int | None:
    """The window that ``window_mask`` has written; None for any other mask."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.int64 or mask.numel() != 1:
        return None
    window = int(mask) - _WINDOW_TAG
    return window if window >= 0 else None


def register() -> None:
    """Makes PAGED and TRACED known to transformers. May be called again."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(PAGED, attention_function)
    AttentionInterface.register(TRACED, attention_function)
    AttentionMaskInterface.register(TRACED, window_mask)
