"""The operations in plain torch: their definition, on any device and in any float type.

Other implementations are tested against this one, so it is written to be read. ``torch_sampling``
defines sampling. Knows no model and no scheduler.
"""

import torch
from torch import Tensor
from torch.nn import functional

from s1engine.ops import AttentionMetadata, Matrix, SamplingMetadata, kv_quant, torch_sampling
from s1engine.ops.quantization import QuantizedMatrix
from s1engine.ops.unfused import Unfused


class TorchOps(Unfused):
    """``Ops`` by torch's functions; softmax, norms and rotations in float32 or float64."""

    name: str = "torch"

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
        """Every model is covered."""

    def pack(self, weight: Tensor | QuantizedMatrix) -> Matrix:
        return weight

    def embed(self, ids: Tensor, weight: Matrix) -> Tensor:
        return functional.embedding(ids, _plain(weight))

    def gather_rows(self, x: Tensor, index: Tensor) -> Tensor:
        return x[index]

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, _plain(weight), bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return functional.rms_norm(_wide(x), weight.shape, _wide(weight), eps).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(residual.add_(x), weight, eps)

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
        cos, sin = cos_sin[meta.positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D/2] each
        _rotate(q, cos, sin)
        _rotate(k, cos, sin)
        block_size = k_cache.shape[2]
        blocks, offsets = meta.slot_mapping // block_size, meta.slot_mapping % block_size
        k_cache[blocks, :, offsets] = kv_quant.quantize(k, k_cache.dtype)
        v_cache[blocks, :, offsets] = kv_quant.quantize(v, v_cache.dtype)

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
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        starts, contexts = meta.cu_seqlens_q.tolist(), meta.context_lens.tolist()
        for row, context in enumerate(contexts):
            tokens = slice(starts[row], starts[row + 1])
            oldest = context - (tokens.stop - tokens.start) - window + 1 if window else 0
            first = max(oldest, 0) // k_cache.shape[2]  # block of the oldest key that is seen
            keys = _gather(k_cache, meta.block_table[row], first, context)
            values = _gather(v_cache, meta.block_table[row], first, context)
            out[tokens] = _attend(q[tokens], keys, values, scale, window, sinks)
        return out.flatten(1)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def gelu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.gelu(gate, approximate="tanh") * up

    def sample(self, logits: Tensor, meta: SamplingMetadata) -> Tensor:
        return torch_sampling.sample(logits, meta)

    def logprobs(self, logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        sanitized = torch_sampling.sanitize_logits(logits.to(torch.float32, copy=True))
        logprobs = sanitized.log_softmax(dim=-1)
        chosen = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1)
        if k == 0:
            return chosen, logprobs[:, :0], token_ids.new_empty(len(token_ids), 0)
        # A stable sort rather than topk: equal logits, common in bfloat16, go by token id.
        ids = sanitized.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        return chosen, logprobs.gather(1, ids), ids

    def score_rows(
        self, logits: Tensor, token_ids: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        size = logits.shape[1]
        unknown = token_ids >= size
        known_ids = token_ids.masked_fill(unknown, 0)
        chosen, top, ids = self.logprobs(logits, known_ids, k)
        values = torch_sampling.sanitize_logits(logits.to(torch.float32, copy=True))
        own = values.gather(1, known_ids.unsqueeze(1))
        before = torch.arange(size, device=logits.device) < known_ids.unsqueeze(1)
        ranks = ((values > own) | ((values == own) & before)).sum(dim=1, dtype=torch.int32) + 1
        chosen = chosen.masked_fill(unknown, -torch.inf)
        return chosen, ranks.masked_fill(unknown, size + 1), top, ids.to(torch.int32)


def _plain(weight: Matrix) -> Tensor:
    if isinstance(weight, QuantizedMatrix):
        return weight.dequantize()
    assert isinstance(weight, Tensor)
    return weight


def _wide(x: Tensor) -> Tensor:
    """x in float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate each pair (x[i], x[i + D/2]) by its angle, in place, rounding once."""
    first, second = _wide(x).chunk(2, dim=-1)
    x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def _gather(cache: Tensor, block_table: Tensor, first: int, context: int) -> Tensor:
    """A row's context of a cache, from its block ``first`` on: [Hkv, n, D], float32 or float64."""
    size = cache.shape[2]
    blocks = cache[block_table[first : -(-context // size)]]  # [used, Hkv, S, stored_dim]
    return kv_quant.dequantize(blocks.transpose(0, 1).flatten(1, 2)[:, : context - first * size])


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, sinks: Tensor | None
) -> Tensor:
    """Attention of the last n tokens of a context: q [n, Hq, D] -> [n, Hq, D]."""
    count, context = q.shape[0], keys.shape[1]
    key = torch.arange(context, device=q.device)
    query = key[context - count :, None]
    mask = key <= query  # [n, context]
    if window:
        mask &= key > query - window
    if sinks is not None:  # a key and a value of zeros, whose logit is the mask's
        keys, values = functional.pad(keys, (0, 0, 0, 1)), functional.pad(values, (0, 0, 0, 1))
        seen = torch.zeros(mask.shape, dtype=keys.dtype, device=q.device).masked_fill(
            ~mask, -torch.inf
        )
        sink = sinks.to(keys.dtype)[:, None, None].expand(-1, count, 1)
        mask = torch.cat((seen.expand(len(sinks), -1, -1), sink), dim=-1)  # [Hq, n, context + 1]
    heads = functional.scaled_dot_product_attention(
        _wide(q).transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        scale=scale,
        enable_gqa=True,
    )
    return heads[0].transpose(0, 1)
