"""The sampler's noise: one unit exponential for each (seed, position, token id), and for nothing
else, so that a draw depends neither on the batch nor on what was drawn before.

    word = Philox4x32-10(key = seed, counter = (id / 4, position low, position high, 0))[id mod 4]
    u = (word + 1/2) / 2^32,  noise = -log(1 - u)

Bit for bit the words of ``s1engine/ops/torch_sampling.py``; the logarithm may differ in its last
bits. Rare large Gumbel values, which decide, come from small u, where 1 - u would round to 1: there
the series of the logarithm is used.
"""

import triton
import triton.language as tl


@triton.jit
def minus_log_of_rest(u):
    """-log(1 - u) for 0 < u < 1."""
    series = 1.0 / 8
    series = series * u + 1.0 / 7
    series = series * u + 1.0 / 6
    series = series * u + 1.0 / 5
    series = series * u + 1.0 / 4
    series = series * u + 1.0 / 3
    series = series * u + 1.0 / 2
    series = (series * u + 1.0) * u  # what is left out is u^8 / 9 of it: 2^-27 at most
    return tl.where(u < 0.125, series, -tl.log(1.0 - u))


@triton.jit
def _exponentials(seed, position, group):
    """Of the ids 4 group .. 4 group + 3, float32 [..., 4 G]; ``group`` int32 [..., G]."""
    zero = group * 0
    low = zero + (position & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = zero + (position >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, group, low, high, zero)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # by token id
    uniform = (words.to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    return minus_log_of_rest(tl.minimum(uniform, 1.0 - 1.0 / 16777216.0))


@triton.jit
def exponential_noise(seed, position, first, TILE: tl.constexpr):
    """Exponentials of the token ids first .. first + TILE - 1, float32 [TILE]; first % 4 is 0."""
    return _exponentials(seed, position, first // 4 + tl.arange(0, TILE // 4))


@triton.jit
def exponential_noise_of_rows(seed, position, first, ROWS: tl.constexpr, TILE: tl.constexpr):
    """The same for several seeds and positions, [ROWS] each: float32 [ROWS, TILE]."""
    group = tl.zeros([ROWS, TILE // 4], tl.int32) + first // 4 + tl.arange(0, TILE // 4)[None, :]
    return _exponentials(seed[:, None], position[:, None], group)
