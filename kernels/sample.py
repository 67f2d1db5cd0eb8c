"""One token a row from its logits, without a softmax and without a sort.

    token = argmax(logits)                                 if the temperature is 0
    token = argmax(logits / temperature - log(noise))      an exact draw from the softmax

over the tokens that the filters keep (``filters``), the lowest id among equals. Two passes: every
tile finds its best token, then one program a row picks the best of the tiles or samples from the
filtered row. ``s1engine/ops/torch_sampling.py`` is the definition; bias and penalties are applied
before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.filters import MIN_TEMPERATURE, load_logits, sample_filtered
from s1engine.kernels.noise import exponential_noise
from s1engine.kernels.pdl import grid_dependency_wait, launch_dependents


@triton.jit
def _sample_tile_kernel(
    logits_ptr,  # [B, V] float32, rows `stride` apart
    temperature_ptr,  # [B]
    seed_ptr,  # [B] int64
    position_ptr,  # [B] int64
    banned_ptr,  # [B] int32; read if there are triggers
    trigger_ptr,  # [NUM_TRIGGERS] int32
    value_ptr,  # [B, tiles] float32: the best score of each tile
    token_ptr,  # [B, tiles] int32: its id
    stride,
    vocab,
    BLOCK_V: tl.constexpr,
    LOGITS_SANITIZED: tl.constexpr,
    NUM_TRIGGERS: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_dependency_wait(PDL)
    row, tile = tl.program_id(0), tl.program_id(1)
    first = tile * BLOCK_V
    temperature = tl.load(temperature_ptr + row)
    drawn = temperature > 0
    divisor = tl.where(drawn, tl.maximum(temperature, MIN_TEMPERATURE), 1.0)
    banned = tl.load(banned_ptr + row) if NUM_TRIGGERS > 0 else 0
    score = load_logits(
        logits_ptr + row.to(tl.int64) * stride, banned, trigger_ptr, first, vocab, divisor,
        BLOCK_V, LOGITS_SANITIZED, NUM_TRIGGERS,
    )  # fmt: skip
    if drawn:
        seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
        score -= tl.log(exponential_noise(seed, position, first, BLOCK_V))
    launch_dependents(PDL)
    value, index = tl.max(score, axis=0, return_indices=True)
    at = row * tl.num_programs(1) + tile
    tl.store(value_ptr + at, value)
    tl.store(token_ptr + at, first + index)


@triton.jit
def _sample_row_kernel(
    logits_ptr,  # [B, V] float32
    temperature_ptr,
    top_k_ptr,  # [B] int32, 0: all
    top_p_ptr,  # [B], 1: all
    min_p_ptr,  # [B], 0: all
    seed_ptr,
    position_ptr,
    banned_ptr,
    trigger_ptr,
    value_ptr,  # [B, tiles]
    token_ptr,  # [B, tiles]
    out_ptr,  # [B] int64
    stride,
    vocab,
    tiles,
    BLOCK_V: tl.constexpr,
    TILES: tl.constexpr,
    LOGITS_SANITIZED: tl.constexpr,
    FILTERED: tl.constexpr,
    NUM_TRIGGERS: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_dependency_wait(PDL)
    row = tl.program_id(0)
    tile = tl.arange(0, TILES)
    values = tl.load(value_ptr + row * tiles + tile, mask=tile < tiles, other=float("-inf"))
    _, best = tl.max(values, axis=0, return_indices=True)
    token = tl.load(token_ptr + row * tiles + best)
    if FILTERED:
        temperature = tl.load(temperature_ptr + row)
        top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
            logits_ptr += row.to(tl.int64) * stride
            divisor = tl.maximum(temperature, MIN_TEMPERATURE)
            banned = tl.load(banned_ptr + row) if NUM_TRIGGERS > 0 else 0
            top = tl.full([1], float("-inf"), tl.float32)
            for first in range(0, vocab, BLOCK_V):
                x = load_logits(
                    logits_ptr, banned, trigger_ptr, first, vocab, divisor,
                    BLOCK_V, LOGITS_SANITIZED, NUM_TRIGGERS,
                )  # fmt: skip
                top = tl.maximum(top, tl.max(x))
            chosen = sample_filtered(
                logits_ptr, banned, trigger_ptr, vocab, divisor, top, top_k, top_p, min_p,
                tl.load(seed_ptr + row), tl.load(position_ptr + row),
                BLOCK_V, LOGITS_SANITIZED, NUM_TRIGGERS,
            )  # fmt: skip
            token = tl.sum(chosen)
    launch_dependents(PDL)
    tl.store(out_ptr + row, token.to(tl.int64))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    filtered: bool,
    logits_sanitized: bool,
    banned: Tensor | None = None,
    triggers: Tensor | None = None,
) -> Tensor:
    """logits [B, V] float32 -> ids [B] int64; the other tensors hold one value a row.

    Args:
        filtered: some row may use top_k, top_p or min_p.
        logits_sanitized: NaN and infinity are already replaced; -inf marks banned tokens.
        banned: [B] int32, nonzero where ``triggers`` [n] int32 must not be sampled.
    """
    rows, vocab = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    for column, dtype in ((temperature, torch.float32), (top_k, torch.int32)):
        assert column.shape == (rows,) and column.dtype == dtype and column.is_contiguous()
    for column in (top_p, min_p):
        assert column.shape == (rows,) and column.dtype == torch.float32
    for column in (seeds, positions):
        assert column.shape == (rows,) and column.dtype == torch.int64
    assert (banned is None) == (triggers is None)
    num_triggers = 0 if triggers is None else len(triggers)
    tiles = triton.cdiv(vocab, launch_table.SAMPLE_TILE)
    values = torch.empty((rows, tiles), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((rows, tiles), dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    ban = (top_k if banned is None else banned, top_k if triggers is None else triggers)
    stride = logits.stride(0)
    _sample_tile_kernel[(rows, tiles)](
        logits, temperature, seeds, positions, *ban, values, tokens, stride, vocab,
        BLOCK_V=launch_table.SAMPLE_TILE, LOGITS_SANITIZED=logits_sanitized,
        NUM_TRIGGERS=num_triggers, **launch_table.SAMPLE.kwargs(),
    )  # fmt: skip
    _sample_row_kernel[(rows,)](
        logits, temperature, top_k, top_p, min_p, seeds, positions, *ban, values, tokens, out,
        stride, vocab, tiles, BLOCK_V=launch_table.FILTER_TILE,
        TILES=launch_table.next_power_of_2(tiles), LOGITS_SANITIZED=logits_sanitized,
        FILTERED=filtered, NUM_TRIGGERS=num_triggers, **launch_table.FILTER.kwargs(),
    )  # fmt: skip
    return out
