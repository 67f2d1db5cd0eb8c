"""How a token is sampled from logits: the definition, with which every other sampler must agree.

Per row: logit bias, penalties, bans -> the likeliest token if the temperature is 0 -> temperature,
top-k, top-p, min-p, each applied to the tokens that the previous filter kept -> the largest
logit / temperature + Gumbel noise: an exact draw from the softmax that computes no softmax.

A token's noise depends on (seed, position, token id) alone, by the counter-based generator
Philox4x32-10: the key is the seed (64 bits), the counter is (token_id // 4, position's low half,
position's high half, 0), and token_id % 4 selects one of its four words. So a sample depends
neither on the batch nor on earlier draws.

NaN and infinity: NaN becomes the smallest logit, and all logits are clamped to +-LOGIT_LIMIT. A row
of nothing but NaN draws at random from the tokens that are not banned.
"""

import math

import torch
from torch import Tensor

from s1engine.ops import Penalties, SamplingMetadata

LOGIT_LIMIT = 1e30  # finite even when divided by MIN_TEMPERATURE
MIN_TEMPERATURE = 1e-6  # lower ones above 0 are raised to this
_DRAW_ELEMENTS = 2**20  # of [B, V] drawn at a time, which bounds the noise's memory

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def sample(logits: Tensor, meta: SamplingMetadata) -> Tensor:
    """logits [B, V] float32, overwritten -> token ids [B] int64."""
    adjust_logits(logits, meta)
    tokens = logits.argmax(dim=-1)  # the lowest id among equals
    if meta.all_greedy:
        return tokens
    random_rows = meta.temperature.nonzero().squeeze(1)
    for rows in torch.split(random_rows, max(1, _DRAW_ELEMENTS // logits.shape[1])):
        tokens[rows] = _draw(logits[rows], rows, meta)
    return tokens


def best_of_shard(logits: Tensor, meta: SamplingMetadata, first: int) -> Tensor:
    """logits [B, n] float32, overwritten, of the ids ``first`` .. ``first`` + n - 1 -> for each row
    [B, 2] float32 the best noisy score and the bits of its id, an int32. ``first`` is a multiple of
    4. No filters, bias or penalties; ids of ``meta.banned`` may belong to other shards.

    Noise depends on the id alone, so the best of all shards is what ``sample`` draws from all
    logits: see ``best_of_shards``."""
    assert first % 4 == 0 and not meta.filtered and meta.bias is None and meta.penalties is None
    sanitize_logits(logits)
    if meta.banned is not None:
        rows, ids = meta.banned
        own = (ids >= first) & (ids < first + logits.shape[1])
        logits[rows[own], ids[own] - first] = -math.inf
    for rows in torch.split(
        meta.temperature.nonzero()[:, 0], max(1, _DRAW_ELEMENTS // logits.shape[1])
    ):
        scaled = logits[rows] / meta.temperature[rows].clamp(min=MIN_TEMPERATURE).unsqueeze(1)
        noise = exponential_noise(meta.seeds[rows], meta.positions[rows], logits.shape[1], first)
        logits[rows] = scaled - noise.log()
    scores, ids = logits.max(dim=-1)  # the lowest id among equals
    return torch.stack((scores, (ids + first).to(torch.int32).view(torch.float32)), dim=1)


def best_of_shards(candidates: Tensor) -> Tensor:
    """candidates [B, 2 size] float32, those of ``best_of_shard`` in the order of their ids -> ids
    [B] int64, the lowest among equals."""
    scores, ids = candidates[:, ::2], candidates.view(torch.int32)[:, 1::2]
    return ids.gather(1, scores.argmax(dim=-1, keepdim=True))[:, 0].to(torch.int64)


def adjust_logits(logits: Tensor, meta: SamplingMetadata) -> None:
    """Replace NaN and infinity, then apply bias, penalties and bans, in place."""
    sanitize_logits(logits)
    if meta.bias is not None:
        rows, ids, values = meta.bias
        logits.index_put_((rows, ids), values, accumulate=True)
    if meta.penalties is not None:
        _penalize(logits, meta.penalties)
        logits.clamp_(-LOGIT_LIMIT, LOGIT_LIMIT)
    if meta.banned is not None:
        logits[meta.banned] = -math.inf


def sanitize_logits(logits: Tensor) -> Tensor:
    """Replace NaN and infinity, in place."""
    return logits.nan_to_num_(nan=-LOGIT_LIMIT).clamp_(-LOGIT_LIMIT, LOGIT_LIMIT)


def _penalize(logits: Tensor, penalties: Penalties) -> None:
    """Repetition over prompt and output, then frequency and presence over the output."""
    in_output = penalties.output_counts > 0
    repetition = penalties.repetition.unsqueeze(1)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits.copy_(torch.where(in_output | penalties.in_prompt, repeated, logits))
    logits.sub_(penalties.frequency.unsqueeze(1) * penalties.output_counts)
    logits.sub_(penalties.presence.unsqueeze(1) * in_output)


def _draw(logits: Tensor, rows: Tensor, meta: SamplingMetadata) -> Tensor:
    """A token for each of ``rows`` of the batch from their adjusted logits; temperature > 0."""
    scaled = logits / meta.temperature[rows].clamp(min=MIN_TEMPERATURE).unsqueeze(1)
    if meta.filtered:
        kept = kept_tokens(scaled, meta.top_k[rows], meta.top_p[rows], meta.min_p[rows])
        scaled.masked_fill_(~kept, -math.inf)
    noise = exponential_noise(meta.seeds[rows], meta.positions[rows], scaled.shape[1])
    return (scaled - noise.log()).argmax(dim=-1)


def kept_tokens(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens [B, V] the filters keep; equally likely tokens rank by rising id.

    top_k (0: all) keeps the k likeliest. top_p (1: all) keeps the fewest of these whose share of
    their probability reaches p. min_p keeps those at least min_p times as likely as the likeliest.
    """
    ranked, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    keep = (rank < top_k.unsqueeze(1)) | (top_k <= 0).unsqueeze(1)
    probabilities = ranked.masked_fill(~keep, -math.inf).softmax(dim=-1).double()
    before = probabilities.cumsum(dim=-1) - probabilities  # of likelier tokens: 0 for the first
    keep &= (before < top_p.unsqueeze(1)) | (top_p >= 1).unsqueeze(1)
    keep &= ranked >= ranked[:, :1] + min_p.log().unsqueeze(1)
    return torch.zeros_like(keep).scatter_(1, order, keep)


def exponential_noise(seeds: Tensor, positions: Tensor, vocab_size: int, first: int = 0) -> Tensor:
    """Unit exponentials [B, vocab_size] of the ids from ``first`` on, a multiple of 4. Their
    negated logarithms are Gumbel noise.

    float32 is coarse near 1 (its largest value below is 1 - 2^-24) and fine near 0. So rare large
    Gumbel values, which decide, come from small u, where -log1p(-u) is exact.
    """
    groups = torch.arange(-(-vocab_size // 4), device=seeds.device).unsqueeze(0) + first // 4
    low, high = _halves(positions.unsqueeze(1))
    words = philox((groups, low, high, torch.zeros_like(low)), _halves(seeds.unsqueeze(1)))
    bits = torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log1p(-uniform.clamp(max=1 - 2.0**-24))


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10 on int64 tensors that hold unsigned 32-bit words and broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        low0, high0 = _halves(c0 * _MULTIPLIERS[0])
        low1, high1 = _halves(c2 * _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of 64; right even for a product that overflows int64."""
    return x & _WORD, (x >> 32) & _WORD
