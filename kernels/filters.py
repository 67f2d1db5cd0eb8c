"""Top-k, top-p and min-p without a sort. Each keeps a prefix of the ranking by (logit descending,
id ascending): the logit at which the prefix ends and the number of equal logits that it keeps.

That logit is found digit by digit. Its float32 bits, mapped to an unsigned integer of the same
order, are searched from the top four bits down. Each pass over the row tries sixteen candidates and
keeps the largest whose weight

    f(t) = sum of w over the logits >= t,   w = 1 (top-k) or exp(logit - max) (top-p)

still reaches the target. Eight passes find it exactly. Knows one row of logits, not requests.
"""

import triton
import triton.language as tl

from s1engine.kernels.noise import exponential_noise

LOGIT_LIMIT: tl.constexpr = tl.constexpr(1.0e30)
MIN_TEMPERATURE: tl.constexpr = tl.constexpr(1.0e-6)
ALL: tl.constexpr = tl.constexpr(2147483647)


@triton.jit
def load_logits(
    logits_ptr,  # of one row
    banned,  # 1: the triggers are never sampled
    trigger_ptr,
    first,
    vocab,
    temperature,
    BLOCK_V: tl.constexpr,
    LOGITS_SANITIZED: tl.constexpr,
    NUM_TRIGGERS: tl.constexpr,
):
    """Logits / temperature of the ids first .. first + BLOCK_V - 1, -inf beyond ``vocab``.
    LOGITS_SANITIZED: NaN and infinity are already replaced."""
    token = first + tl.arange(0, BLOCK_V)
    x = tl.load(logits_ptr + token, mask=token < vocab, other=float("-inf"))
    if not LOGITS_SANITIZED:
        x = tl.where(x == x, x, -LOGIT_LIMIT)
        x = tl.minimum(tl.maximum(x, -LOGIT_LIMIT), LOGIT_LIMIT)
        x = tl.where(token < vocab, x, float("-inf"))
    for i in tl.static_range(NUM_TRIGGERS):
        trigger = tl.load(trigger_ptr + i)
        x = tl.where((token == trigger) & (banned != 0), float("-inf"), x)
    return tl.div_rn(x, broadcast_scalar(temperature, BLOCK_V)) + 0.0  # -0 becomes 0: equal


@triton.jit
def broadcast_scalar(scalar, BLOCK_V: tl.constexpr):
    """A tensor of the scalar, which an exactly rounded division requires."""
    return tl.zeros([BLOCK_V], tl.float32) + scalar


@triton.jit
def sortable_key(x):
    """float32 -> uint32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    flip = tl.where(bits < 0, -1, -2147483648).to(tl.int32)
    return (bits ^ flip).to(tl.uint32, bitcast=True)


@triton.jit
def float_of_key(key):
    bits = key.to(tl.int32, bitcast=True)
    flip = tl.where(bits < 0, -2147483648, -1).to(tl.int32)
    return (bits ^ flip).to(tl.float32, bitcast=True)


@triton.jit
def search_key(
    logits_ptr, banned, trigger_ptr, vocab, temperature, top, target,
    WEIGHTED: tl.constexpr, BLOCK_V: tl.constexpr, LOGITS_SANITIZED: tl.constexpr,
    NUM_TRIGGERS: tl.constexpr,
):  # fmt: skip
    """The largest key t with f(t) >= target, and f just above it: f(t + 1)."""
    digit = tl.arange(0, 16)
    key = tl.zeros([1], tl.uint32)
    above = tl.zeros([1], tl.float32)
    shift = tl.full([1], 28, tl.uint32)
    for _ in range(8):
        candidate = key + (digit.to(tl.uint32) << shift)  # [16]
        reached = tl.zeros([16], tl.float32)
        for first in range(0, vocab, BLOCK_V):
            x = load_logits(
                logits_ptr, banned, trigger_ptr, first, vocab, temperature,
                BLOCK_V, LOGITS_SANITIZED, NUM_TRIGGERS,
            )  # fmt: skip
            weight = tl.exp(x - top) if WEIGHTED else tl.where(x == x, 1.0, 0.0)
            beyond = first + tl.arange(0, BLOCK_V) >= vocab
            weight = tl.where(beyond, 0.0, weight)
            counted = sortable_key(x)[None, :] >= candidate[:, None]  # [16, BLOCK_V]
            reached += tl.sum(tl.where(counted, weight[None, :], 0.0), axis=1)
        best = tl.maximum(tl.sum((reached >= target).to(tl.int32)) - 1, 0)
        following = tl.sum(tl.where(digit == best + 1, reached, 0.0))
        above = tl.where(best < 15, following, above)
        key += best.to(tl.uint32) << shift
        shift -= 4
    return key, above


@triton.jit
def mass_above(
    logits_ptr, banned, trigger_ptr, vocab, temperature, top, key,
    BLOCK_V: tl.constexpr, LOGITS_SANITIZED: tl.constexpr, NUM_TRIGGERS: tl.constexpr,
):  # fmt: skip
    """Sum of exp(logit - top) over the logits whose key exceeds ``key`` [1]."""
    total = tl.zeros([1], tl.float32)
    for first in range(0, vocab, BLOCK_V):
        x = load_logits(
            logits_ptr, banned, trigger_ptr, first, vocab, temperature,
            BLOCK_V, LOGITS_SANITIZED, NUM_TRIGGERS,
        )  # fmt: skip
        total += tl.sum(tl.where(sortable_key(x) > key, tl.exp(x - top), 0.0))
    return total


@triton.jit
def find_cutoff(
    logits_ptr, banned, trigger_ptr, vocab, temperature, top, top_k, top_p,
    BLOCK_V: tl.constexpr, LOGITS_SANITIZED: tl.constexpr, NUM_TRIGGERS: tl.constexpr,
):  # fmt: skip
    """Where top-k and then top-p end the ranking: the last key [1], and how many equals [1]."""
    key = tl.zeros([1], tl.uint32)
    equals = tl.full([1], ALL, tl.int32)
    if (top_k > 0) & (top_k < vocab):
        key, above = search_key(
            logits_ptr, banned, trigger_ptr, vocab, temperature, top, top_k.to(tl.float32),
            False, BLOCK_V, LOGITS_SANITIZED, NUM_TRIGGERS,
        )  # fmt: skip
        equals = top_k - above.to(tl.int32)
    if top_p < 1.0:
        total = mass_above(
            logits_ptr, banned, trigger_ptr, vocab, temperature, top, key,
            BLOCK_V, LOGITS_SANITIZED, NUM_TRIGGERS,
        )  # fmt: skip
        limited = equals < ALL
        total += tl.where(limited, equals.to(tl.float32) * tl.exp(float_of_key(key) - top), 0.0)
        p_key, above = search_key(
            logits_ptr, banned, trigger_ptr, vocab, temperature, top, top_p * total,
            True, BLOCK_V, LOGITS_SANITIZED, NUM_TRIGGERS,
        )  # fmt: skip
        one = tl.maximum(tl.exp(float_of_key(p_key) - top), 1.0e-38)
        some = tl.minimum(tl.ceil((top_p * total - above) / one), 1.0e9)
        needed = tl.maximum(some.to(tl.int32), 1)
        equals = tl.where(
            p_key > key, needed, tl.where(p_key == key, tl.minimum(needed, equals), equals)
        )
        key = tl.maximum(p_key, key)
    return key, equals


@triton.jit
def sample_filtered(
    logits_ptr, banned, trigger_ptr, vocab, temperature, top, top_k, top_p, min_p, seed, position,
    BLOCK_V: tl.constexpr, LOGITS_SANITIZED: tl.constexpr, NUM_TRIGGERS: tl.constexpr,
):  # fmt: skip
    """The id with the largest logit / temperature + Gumbel noise among the kept tokens, [1]."""
    key, equals = find_cutoff(
        logits_ptr, banned, trigger_ptr, vocab, temperature, top, top_k, top_p,
        BLOCK_V, LOGITS_SANITIZED, NUM_TRIGGERS,
    )  # fmt: skip
    floor = tl.where(min_p > 0, top + tl.log(tl.maximum(min_p, 1.0e-38)), float("-inf"))
    best = tl.full([1], float("-inf"), tl.float32)
    chosen = tl.zeros([1], tl.int32)
    seen = tl.zeros([1], tl.int32)  # equals met so far
    for first in range(0, vocab, BLOCK_V):
        x = load_logits(
            logits_ptr, banned, trigger_ptr, first, vocab, temperature,
            BLOCK_V, LOGITS_SANITIZED, NUM_TRIGGERS,
        )  # fmt: skip
        keys = sortable_key(x)
        equal = ((keys == key) & (first + tl.arange(0, BLOCK_V) < vocab)).to(tl.int32)
        if tl.max(((keys >= key) & (x >= floor)).to(tl.int32)) > 0:
            rank = tl.cumsum(equal, axis=0) - equal + seen
            keep = (keys > key) | ((equal > 0) & (rank < equals))
            noise = exponential_noise(seed, position, first, BLOCK_V)
            score = tl.where(keep & (x >= floor), x - tl.log(noise), float("-inf"))
            value, index = tl.max(score, axis=0, return_indices=True)
            chosen = tl.where(value > best, first + index, chosen)
            best = tl.maximum(best, value)
        seen += tl.sum(equal)
    return chosen
