"""How kernels are judged: their error against float64 is at most twice torch's in the same type.

``slack`` allows for sums that torch happens to compute exactly.
"""

import math

import torch
from torch import Tensor

from s1engine.ops import AttentionMetadata
from tests.ops.test_torch_ops import randn
from tests.paged import make_meta


def assert_as_good_as(actual: Tensor, by_torch: Tensor, truth: Tensor, slack: float = 1.0) -> None:
    """``truth`` is float64; ``slack`` is in units of the type's last place at the largest value."""
    assert actual.dtype == by_torch.dtype and not actual.isnan().any()
    unit = torch.finfo(actual.dtype).eps * float(truth.abs().max())
    error = float((actual.double() - truth).abs().max())
    allowed = 2 * float((by_torch.double() - truth).abs().max()) + slack * unit
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def attention_case(
    lens: list[tuple[int, int]],
    block_size: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, AttentionMetadata]:
    """q as a view of a wider buffer, caches with NaN in every slot without a token, and metadata.
    ``lens``: tokens and context of each row; ``heads``: query heads, KV heads, head size."""
    counts, contexts = [count for count, _ in lens], [context for _, context in lens]
    num_heads, num_kv_heads, dim = heads
    blocks = len(lens) * -(-max(contexts) // block_size) + 1
    whole = make_meta(contexts, contexts, block_size, blocks, seed=seed)
    meta = make_meta(counts, contexts, block_size, blocks, seed=seed)
    caches = []
    for salt in (1, 2):
        cache = torch.full((blocks, num_kv_heads, block_size, dim), math.nan, dtype=dtype)
        slots = whole.slot_mapping
        filled = randn(len(slots), num_kv_heads, dim, seed=seed + salt, dtype=dtype)
        cache[slots // block_size, :, slots % block_size] = filled
        caches.append(cache)
    wide = randn(sum(counts), num_heads + 1, dim, seed=seed + 3, dtype=dtype)
    return wide[:, :num_heads], caches[0], caches[1], meta


def in_double(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scale: float,
    meta: AttentionMetadata,
    window: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of every token in float64, [T, Hq * D]. Reads every block of the contexts."""
    size, group = k_cache.shape[2], q.shape[1] // k_cache.shape[1]
    starts, contexts = meta.cu_seqlens_q.tolist(), meta.context_lens.tolist()
    out = torch.empty(q.shape, dtype=torch.float64)
    for row, context in enumerate(contexts):
        tokens = slice(starts[row], starts[row + 1])
        blocks = meta.block_table[row, : -(-context // size)].long()
        keys, values = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context].double()
            for cache in (k_cache, v_cache)
        )  # [Hkv, context, D]
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = torch.einsum("thd,hcd->htc", q[tokens].double(), keys) * scale
        count = starts[row + 1] - starts[row]
        key, query = torch.arange(context), torch.arange(context - count, context)[:, None]
        allowed = (key <= query) & (key > query - (window or context))
        scores = scores.masked_fill(~allowed, -math.inf)
        if sinks is not None:
            logits = sinks.double()[:, None, None].expand(-1, count, 1)
            scores = torch.cat((scores, logits), dim=-1)
        weights = scores.softmax(-1)[..., :context]
        out[tokens] = torch.einsum("htc,hcd->thd", weights, values)
    return out.flatten(1)
