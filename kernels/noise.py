"""The sampler's noise: a unit exponential that depends on (seed, position, token id) alone, neither
on the batch nor on earlier draws.

    word = Philox4x32-10(key = seed, counter = (id / 4, position low, position high, 0))[id mod 4]
    u = (word + 1/2) / 2^32,  noise = -log(1 - u)

The words equal those of ``s1engine/ops/torch_sampling.py`` bit for bit; the logarithm may differ in
its last bits. Rare large Gumbel values, which decide, come from small u, where 1 - u would round to
1: there the logarithm's series is used.
"""

import triton
import triton.language as tl


@triton.jit
def exponential_from_uniform(u):
    """-log(1 - u), 0 < u < 1."""
    series = 1.0 / 8
    series = series * u + 1.0 / 7
    series = series * u + 1.0 / 6
    series = series * u + 1.0 / 5
    series = series * u + 1.0 / 4
    series = series * u + 1.0 / 3
    series = series * u + 1.0 / 2
    series = (series * u + 1.0) * u  # relative error: u^8 / 9, at most 2^-27
    return tl.where(u < 0.125, series, -tl.log(1.0 - u))


@triton.jit
def _exponentials(seed, position, group):
    """Noise of the ids 4 group .. 4 group + 3, float32 [..., 4 n]; ``group`` int32 [..., n]."""
    zero = group * 0
    low = zero + (position & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = zero + (position >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, group, low, high, zero)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # by token id
    uniform = (words.to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    return exponential_from_uniform(tl.minimum(uniform, 1.0 - 1.0 / 16777216.0))


@triton.jit
def exponential_noise(seed, position, first, BLOCK_V: tl.constexpr):
    """Noise of the ids first .. first + BLOCK_V - 1, float32 [BLOCK_V]; first % 4 is 0."""
    return _exponentials(seed, position, first // 4 + tl.arange(0, BLOCK_V // 4))


@triton.jit
def exponential_noise_of_rows(seed, position, first, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr):
    """The same for several seeds and positions, [BLOCK_B] each: float32 [BLOCK_B, BLOCK_V]."""
    groups = tl.zeros([BLOCK_B, BLOCK_V // 4], tl.int32) + first // 4
    groups += tl.arange(0, BLOCK_V // 4)[None, :]
    return _exponentials(seed[:, None], position[:, None], groups)
