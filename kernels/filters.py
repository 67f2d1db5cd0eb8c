"""Top-k, top-p and min-p without a sort: each keeps a prefix of the ranking by (logit descending,
id ascending), so a prefix is told by the logit that it ends with and how many equals it takes.

That logit is found digit by digit. Its float32 bits, turned into an unsigned integer of the same
order, are searched from the top four bits down: sixteen candidates a pass over the row, of which
the largest stays whose weight

    f(t) = sum of w over the logits >= t,   w = 1 (top-k) or exp(logit - max) (top-p)

still reaches the target. Eight passes find it exactly. Knows a row of logits, not requests.
"""

import triton
import triton.language as tl

from s1engine.kernels.noise import exponential_noise

LOGIT_LIMIT: tl.constexpr = tl.constexpr(1.0e30)
MIN_TEMPERATURE: tl.constexpr = tl.constexpr(1.0e-6)
ALL: tl.constexpr = tl.constexpr(2147483647)


@triton.jit
def load_logits(
    logits_ptr,  # the row's
    banned,  # 1: the triggers are not to be sampled
    trigger_ptr,
    first,
    size,
    temperature,
    TILE: tl.constexpr,
    CLEAN: tl.constexpr,
    NUM_TRIGGERS: tl.constexpr,
):
    """Logits / temperature of the ids first .. first + TILE - 1, -inf beyond ``size``."""
    token = first + tl.arange(0, TILE)
    x = tl.load(logits_ptr + token, mask=token < size, other=float("-inf"))
    if not CLEAN:
        x = tl.where(x == x, x, -LOGIT_LIMIT)
        x = tl.minimum(tl.maximum(x, -LOGIT_LIMIT), LOGIT_LIMIT)
        x = tl.where(token < size, x, float("-inf"))
    for i in tl.static_range(NUM_TRIGGERS):
        trigger = tl.load(trigger_ptr + i)
        x = tl.where((token == trigger) & (banned != 0), float("-inf"), x)
    return tl.div_rn(x, repeat(temperature, TILE)) + 0.0  # -0 becomes 0: they are equal


@triton.jit
def repeat(scalar, TILE: tl.constexpr):
    """A scalar repeated, which an exactly rounded division asks for."""
    return tl.zeros([TILE], tl.float32) + scalar


@triton.jit
def to_key(x):
    """float32 -> uint32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    flip = tl.where(bits < 0, -1, -2147483648).to(tl.int32)
    return (bits ^ flip).to(tl.uint32, bitcast=True)


@triton.jit
def from_key(key):
    bits = key.to(tl.int32, bitcast=True)
    flip = tl.where(bits < 0, -2147483648, -1).to(tl.int32)
    return (bits ^ flip).to(tl.float32, bitcast=True)


@triton.jit
def search(
    logits_ptr, banned, trigger_ptr, size, temperature, top, target,
    WEIGHTED: tl.constexpr, TILE: tl.constexpr, CLEAN: tl.constexpr, NUM_TRIGGERS: tl.constexpr,
):  # fmt: skip
    """The largest key t with f(t) >= target, and f just above it: f(t + 1)."""
    digit = tl.arange(0, 16)
    found = tl.zeros([1], tl.uint32)
    above = tl.zeros([1], tl.float32)
    shift = tl.full([1], 28, tl.uint32)
    for _ in range(8):
        candidate = found + (digit.to(tl.uint32) << shift)  # [16]
        reached = tl.zeros([16], tl.float32)
        for first in range(0, size, TILE):
            x = load_logits(
                logits_ptr, banned, trigger_ptr, first, size, temperature, TILE, CLEAN, NUM_TRIGGERS
            )
            weight = tl.exp(x - top) if WEIGHTED else tl.where(x == x, 1.0, 0.0)
            beyond = first + tl.arange(0, TILE) >= size
            weight = tl.where(beyond, 0.0, weight)
            take = to_key(x)[None, :] >= candidate[:, None]  # [16, TILE]
            reached += tl.sum(tl.where(take, weight[None, :], 0.0), axis=1)
        best = tl.maximum(tl.sum((reached >= target).to(tl.int32)) - 1, 0)
        following = tl.sum(tl.where(digit == best + 1, reached, 0.0))
        above = tl.where(best < 15, following, above)
        found += best.to(tl.uint32) << shift
        shift -= 4
    return found, above


@triton.jit
def mass_above(
    logits_ptr, banned, trigger_ptr, size, temperature, top, key,
    TILE: tl.constexpr, CLEAN: tl.constexpr, NUM_TRIGGERS: tl.constexpr,
):  # fmt: skip
    """Sum of exp(logit - top) over the logits whose key exceeds ``key`` [1]."""
    total = tl.zeros([1], tl.float32)
    for first in range(0, size, TILE):
        x = load_logits(
            logits_ptr, banned, trigger_ptr, first, size, temperature, TILE, CLEAN, NUM_TRIGGERS
        )
        total += tl.sum(tl.where(to_key(x) > key, tl.exp(x - top), 0.0))
    return total


@triton.jit
def cut(
    logits_ptr, banned, trigger_ptr, size, temperature, top, top_k, top_p,
    TILE: tl.constexpr, CLEAN: tl.constexpr, NUM_TRIGGERS: tl.constexpr,
):  # fmt: skip
    """Where top-k and then top-p end the ranking: the last key [1], and how many equals [1]."""
    key = tl.zeros([1], tl.uint32)
    equals = tl.full([1], ALL, tl.int32)
    if (top_k > 0) & (top_k < size):
        key, above = search(
            logits_ptr, banned, trigger_ptr, size, temperature, top, top_k.to(tl.float32),
            False, TILE, CLEAN, NUM_TRIGGERS,
        )  # fmt: skip
        equals = top_k - above.to(tl.int32)
    if top_p < 1.0:
        total = mass_above(
            logits_ptr, banned, trigger_ptr, size, temperature, top, key, TILE, CLEAN, NUM_TRIGGERS
        )
        limited = equals < ALL
        total += tl.where(limited, equals.to(tl.float32) * tl.exp(from_key(key) - top), 0.0)
        p_key, above = search(
            logits_ptr, banned, trigger_ptr, size, temperature, top, top_p * total,
            True, TILE, CLEAN, NUM_TRIGGERS,
        )  # fmt: skip
        one = tl.maximum(tl.exp(from_key(p_key) - top), 1.0e-38)
        some = tl.minimum(tl.ceil((top_p * total - above) / one), 1.0e9)
        needed = tl.maximum(some.to(tl.int32), 1)
        equals = tl.where(
            p_key > key, needed, tl.where(p_key == key, tl.minimum(needed, equals), equals)
        )
        key = tl.maximum(p_key, key)
    return key, equals


@triton.jit
def draw_filtered(
    logits_ptr, banned, trigger_ptr, size, temperature, top, top_k, top_p, min_p, seed, position,
    TILE: tl.constexpr, CLEAN: tl.constexpr, NUM_TRIGGERS: tl.constexpr,
):  # fmt: skip
    """The id with the largest logit / T + Gumbel noise among those that the filters keep, [1]."""
    key, equals = cut(
        logits_ptr, banned, trigger_ptr, size, temperature, top, top_k, top_p,
        TILE, CLEAN, NUM_TRIGGERS,
    )  # fmt: skip
    floor = tl.where(min_p > 0, top + tl.log(tl.maximum(min_p, 1.0e-38)), float("-inf"))
    best = tl.full([1], float("-inf"), tl.float32)
    chosen = tl.zeros([1], tl.int32)
    seen = tl.zeros([1], tl.int32)  # equals met so far
    for first in range(0, size, TILE):
        x = load_logits(
            logits_ptr, banned, trigger_ptr, first, size, temperature, TILE, CLEAN, NUM_TRIGGERS
        )
        keys = to_key(x)
        equal = ((keys == key) & (first + tl.arange(0, TILE) < size)).to(tl.int32)
        if tl.max(((keys >= key) & (x >= floor)).to(tl.int32)) > 0:
            rank = tl.cumsum(equal, axis=0) - equal + seen
            keep = (keys > key) | ((equal > 0) & (rank < equals))
            noise = exponential_noise(seed, position, first, TILE)
            score = tl.where(keep & (x >= floor), x - tl.log(noise), float("-inf"))
            value, index = tl.max(score, axis=0, return_indices=True)
            chosen = tl.where(value > best, first + index, chosen)
            best = tl.maximum(best, value)
        seen += tl.sum(equal)
    return chosen
