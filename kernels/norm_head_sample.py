"""The end of a decode step: RMSNorm, LM head and the choice of a token, without storing logits.

    logits = rms_norm(x) W^T                                (rounded to the type of x)
    token  = argmax(logits)  or  argmax(logits / temperature - log(noise)),  as in ``sample``

One kernel norms x. A second computes the logits of BLOCK_N token ids for all rows of the batch and
stores each row's best; a third picks the best of the tiles, the lowest id among equals. It is for
steps whose rows need nothing more of the logits: no filters, penalties, bias or log-probabilities.
Triggers may be banned row by row, as the budget requires.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.filters import LOGIT_LIMIT, MIN_TEMPERATURE
from s1engine.kernels.noise import exponential_noise_of_rows
from s1engine.kernels.pdl import grid_dependency_wait, launch_dependents
from s1engine.kernels.rms_norm import rms_norm
from s1engine.kernels.skinny_gemm import check_operands, skinny_gemm_tile


@triton.jit(do_not_specialize=["rows", "first"])
def _head_tile_kernel(
    x_ptr,  # [B, K], normed
    w_ptr,  # [V, K]
    temperature_ptr,  # [B]
    seed_ptr,  # [B] int64
    position_ptr,  # [B] int64
    banned_ptr,  # [B] int32; read if there are triggers
    trigger_ptr,  # [NUM_TRIGGERS] int32
    value_ptr,  # [B, tiles] float32: the best score of each tile
    token_ptr,  # [B, tiles] int32: its id
    rows,
    vocab,
    first,  # id of the first row of w
    x_stride,
    K: tl.constexpr,
    NUM_TRIGGERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    tl.static_assert(SPLIT_K == 1)
    tile, b = tl.program_id(0), tl.arange(0, BLOCK_T)
    token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    live = b < rows
    acc, _ = skinny_gemm_tile(
        x_ptr, x_ptr, w_ptr, w_ptr, tl.minimum(token, vocab - 1), tl.minimum(b, rows - 1),
        x_stride, 0, K, K, BLOCK_N, BLOCK_T, BLOCK_K, False, DOT, PDL,
    )  # fmt: skip
    logits = tl.trans(acc).to(x_ptr.dtype.element_ty).to(tl.float32)
    logits = tl.where(logits == logits, logits, -LOGIT_LIMIT)
    logits = tl.minimum(tl.maximum(logits, -LOGIT_LIMIT), LOGIT_LIMIT)
    logits = tl.where((token < vocab)[None, :], logits, float("-inf"))
    if NUM_TRIGGERS > 0:
        banned = (tl.load(banned_ptr + b, mask=live, other=0) != 0)[:, None]
        for i in tl.static_range(NUM_TRIGGERS):
            trigger = tl.load(trigger_ptr + i)
            logits = tl.where(banned & (token + first == trigger)[None, :], float("-inf"), logits)
    temperature = tl.load(temperature_ptr + b, mask=live, other=0.0)
    drawn = temperature > 0
    divisor = tl.where(drawn, tl.maximum(temperature, MIN_TEMPERATURE), 1.0)
    score = tl.div_rn(logits, tl.broadcast_to(divisor[:, None], [BLOCK_T, BLOCK_N])) + 0.0
    if tl.max(drawn.to(tl.int32)) > 0:
        seed = tl.load(seed_ptr + b, mask=live, other=0)
        position = tl.load(position_ptr + b, mask=live, other=0)
        begin = first + tile * BLOCK_N
        noise = exponential_noise_of_rows(seed, position, begin, BLOCK_T, BLOCK_N)
        score = tl.where(drawn[:, None], score - tl.log(noise), score)
    value, index = tl.max(score, axis=1, return_indices=True)
    at = b * tl.num_programs(0) + tile
    tl.store(value_ptr + at, value, mask=live)
    tl.store(token_ptr + at, first + tile * BLOCK_N + index, mask=live)


@triton.jit
def _best_tile_kernel(
    value_ptr,  # [B, tiles]
    token_ptr,  # [B, tiles]
    out_ptr,  # [B] int64, or [B, 2] float32: the score and the bits of the id
    tiles,
    TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_dependency_wait(PDL)
    row, tile = tl.program_id(0), tl.arange(0, TILES)
    values = tl.load(value_ptr + row * tiles + tile, mask=tile < tiles, other=float("-inf"))
    launch_dependents(PDL)
    value, best = tl.max(values, axis=0, return_indices=True)
    token = tl.load(token_ptr + row * tiles + best)
    if CANDIDATES:
        tl.store(out_ptr + 2 * row, value)
        tl.store(out_ptr + 2 * row + 1, token.to(tl.float32, bitcast=True))
    else:
        tl.store(out_ptr + row, token.to(tl.int64))


def norm_head_sample(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    banned: Tensor | None = None,
    triggers: Tensor | None = None,
) -> Tensor:
    """x [B, K], norm [K], weight [V, K] -> ids [B] int64; the other arguments as in ``sample``."""
    out = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    _launch(x, norm, eps, weight, temperature, seeds, positions, 0, out, banned, triggers)
    return out


def best_of_shard(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    first: int,
    *,
    banned: Tensor | None = None,
    triggers: Tensor | None = None,
) -> Tensor:
    """The same for a weight [n, K] of the ids from ``first`` on, a multiple of 4: [B, 2] float32,
    the best score of each row and the bits of its id, an int32."""
    assert first % 4 == 0
    out = torch.empty((x.shape[0], 2), dtype=torch.float32, device=x.device)
    _launch(x, norm, eps, weight, temperature, seeds, positions, first, out, banned, triggers)
    return out


def _launch(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    first: int,
    out: Tensor,
    banned: Tensor | None,
    triggers: Tensor | None,
) -> None:
    rows, k = check_operands(x, weight, norm)
    vocab = weight.shape[0]
    assert temperature.shape == (rows,) and temperature.dtype == torch.float32
    for column in (seeds, positions):
        assert column.shape == (rows,) and column.dtype == torch.int64
    assert (banned is None) == (triggers is None)
    x = rms_norm(x, norm, eps)
    launch = launch_table.head_tiles(rows, k, x.element_size())
    tiles = launch_table.cdiv(vocab, launch.block_n)
    values = torch.empty((rows, tiles), dtype=torch.float32, device=x.device)
    tokens = torch.empty((rows, tiles), dtype=torch.int32, device=x.device)
    ban = (tokens if banned is None else banned, tokens if triggers is None else triggers)
    _head_tile_kernel[(tiles,)](
        x, weight, temperature, seeds, positions, *ban, values, tokens,
        rows, vocab, first, x.stride(0), K=k,
        NUM_TRIGGERS=0 if triggers is None else len(triggers), **launch.kwargs(),
    )  # fmt: skip
    _best_tile_kernel[(rows,)](
        values, tokens, out, tiles,
        TILES=launch_table.next_power_of_2(tiles), CANDIDATES=out.dtype == torch.float32,
        **launch_table.BEST_TILE.kwargs(),
    )  # fmt: skip
