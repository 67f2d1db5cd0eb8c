"""What follows a sampled token, decided on the device: the thinking budget, and the next input.

The transition is the table of ``csrc/core/budget.hpp``, bit for bit; in its letters (n thinking
tokens, w waits used), for a row that is THINKING:

    ignored = n < min or w < num_waits             fits = n + |wait| < max
    trigger:  ignored and fits -> the wait phrase; ignored, n < min < max -> nothing; else the
              natural end
    other:    n < max -> keep it, n += 1;          n >= max now -> the forced end

What is appended stands in one flat array of phrases and is fed one token a step: while a phrase is
pending, what was sampled means nothing. Where nothing is appended the same token is fed again, its
triggers banned. A row that has finished feeds token 0 into the null slot, over a context of 0
tokens, until the host retires it.

Everything about a row stands in its column of ``lanes``, written first by the scheduler
(csrc/core/device_batch.hpp). The host needs the sampled ids alone to follow: ``output_tokens``
holds them, step by step, and IGNORED where they meant nothing. Knows rows, not sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.pdl import grid_dependency_wait, launch_dependents

# Rows of ``lanes`` [len(FIELDS), B] int32, as the scheduler writes them: the budget's state, with
# the token just fed and the phrase tokens pending at phrases[pending:pending + remaining];
# parameters, where phrases and stop tokens are begin and length (the forced end begins with the
# newline); and the inputs of the next step.
FIELDS = (
    "phase", "banned", "tail_newline", "thinking_tokens", "max_thinking", "waits_used", "pending",
    "remaining", "input", "position", "finish",
    "min_thinking", "num_waits", "wait_begin", "wait_len", "wait_newline", "natural_begin",
    "natural_len", "forced_begin", "newline_len", "forced_len", "newline_always", "max_len",
    "stop_begin", "stop_len",
    "input_ids", "positions", "context_lens", "sample_banned",
)  # fmt: skip

# Numbered as in csrc/core/types.hpp.
THINKING: tl.constexpr = tl.constexpr(1)
ANSWERING: tl.constexpr = tl.constexpr(2)
STOP: tl.constexpr = tl.constexpr(1)
LENGTH: tl.constexpr = tl.constexpr(2)

IGNORED = -1
_IGNORED: tl.constexpr = tl.constexpr(IGNORED)


@triton.jit
def _is_in(token, list_ptr, begin, size, live):
    """Does each row's token stand in its list list_ptr[begin:begin + size]?"""
    found = token < token  # false
    for i in range(tl.max(size)):
        inside = live & (i < size)
        entry = tl.load(list_ptr + begin + i, mask=inside, other=0)
        found = found | (inside & (entry == token))
    return found


@triton.jit
def _advance(
    phase, banned, tail, n, maximum, waits, min_thinking, num_waits, wait_begin, wait_len,
    wait_newline, natural_begin, natural_len, forced_begin, newline_len, forced_len,
    newline_always, trigger, ends_line,
):  # fmt: skip
    """One transition of every row; ``trigger`` and ``ends_line`` tell about the sampled token.

    Returns the new phase, banned, tail, n and waits, whether the token is kept, and the phrase that
    follows.
    """
    thinking = phase == THINKING
    ends, other = thinking & trigger, thinking & (trigger == 0)
    below = n < min_thinking
    ignored = ends & (below | (waits < num_waits))
    wait = ignored & (wait_len < maximum - n)
    refuse = ignored & (wait == 0) & below & (n < maximum)
    natural = ends & (wait == 0) & (refuse == 0)
    kept = other & (n < maximum)
    n += kept.to(tl.int32)
    tail = tl.where(kept, ends_line.to(tl.int32), tail)
    forced = other & (n >= maximum)
    newline = (newline_always != 0) | (tail == 0)

    length = tl.where(wait, wait_len, tl.where(natural, natural_len, 0))
    begin = tl.where(wait, wait_begin, natural_begin)
    length = tl.where(forced, forced_len + tl.where(newline, newline_len, 0), length)
    begin = tl.where(forced, forced_begin + tl.where(newline, 0, newline_len), begin)

    banned = tl.where(thinking, (wait | refuse).to(tl.int32), banned)
    waits += wait.to(tl.int32)
    n += tl.where(wait, wait_len, 0)
    tail = tl.where(wait & (wait_len > 0), wait_newline, tail)
    phase = tl.where(forced | natural, ANSWERING, phase)
    return phase, banned, tail, n, waits, kept | (thinking == 0), begin, length


@triton.jit(do_not_specialize=["rows"])
def _budget_step_kernel(
    sampled_ptr,  # [B] int64
    lane_ptr,  # [len(FIELDS), B] int32
    phrase_ptr,  # int32, phrases and stop lists of all rows
    trigger_ptr,  # [num_triggers] int32
    newline_ptr,  # [vocab] uint8, does the token's text end in a newline?
    table_ptr,  # [B, max_blocks] int32
    slot_ptr,  # [B] int64
    sample_position_ptr,  # [B] int64
    output_tokens_ptr,  # [steps, B] int32
    step_counter_ptr,  # [1] int32, steps so far
    rows,
    num_triggers,
    vocab,
    table_stride,
    num_steps,
    null_slot,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)  # one program crowds nobody out
    grid_dependency_wait(PDL)
    b = tl.arange(0, ROWS)
    live = b < rows
    s = lane_ptr + b  # state
    p = s + 11 * rows  # parameters
    inputs = s + 25 * rows
    phase = tl.load(s, mask=live, other=0)
    banned = tl.load(s + rows, mask=live, other=0)
    tail = tl.load(s + 2 * rows, mask=live, other=0)
    n = tl.load(s + 3 * rows, mask=live, other=0)
    maximum = tl.load(s + 4 * rows, mask=live, other=0)
    waits = tl.load(s + 5 * rows, mask=live, other=0)
    pending = tl.load(s + 6 * rows, mask=live, other=0)
    remaining = tl.load(s + 7 * rows, mask=live, other=0)
    fed = tl.load(s + 8 * rows, mask=live, other=0)
    position = tl.load(s + 9 * rows, mask=live, other=0)
    finish = tl.load(s + 10 * rows, mask=live, other=STOP)
    sampled = tl.load(sampled_ptr + b, mask=live, other=0).to(tl.int32)

    decides = live & (finish == 0) & (remaining == 0)
    thought = phase == THINKING
    known = decides & (sampled >= 0) & (sampled < vocab)
    ends_line = tl.load(newline_ptr + sampled, mask=known, other=0) != 0
    zero = tl.zeros([ROWS], tl.int32)
    trigger = _is_in(sampled, trigger_ptr, zero, zero + num_triggers, decides)
    wait_len = tl.load(p + 3 * rows, mask=live, other=0)
    min_thinking = tl.load(p, mask=live, other=0)
    new_phase, new_banned, new_tail, new_n, new_waits, keeps, begin, length = _advance(
        phase, banned, tail, n, maximum, waits, min_thinking,
        tl.load(p + rows, mask=live, other=0),
        tl.load(p + 2 * rows, mask=live, other=0),
        wait_len,
        tl.load(p + 4 * rows, mask=live, other=0),
        tl.load(p + 5 * rows, mask=live, other=0),
        tl.load(p + 6 * rows, mask=live, other=0),
        tl.load(p + 7 * rows, mask=live, other=0),
        tl.load(p + 8 * rows, mask=live, other=0),
        tl.load(p + 9 * rows, mask=live, other=0),
        tl.load(p + 10 * rows, mask=live, other=0),
        trigger, ends_line,
    )  # fmt: skip
    phase = tl.where(decides, new_phase, phase)
    banned = tl.where(decides, new_banned, banned)
    tail = tl.where(decides, new_tail, tail)
    n = tl.where(decides, new_n, n)
    waits = tl.where(decides, new_waits, waits)
    keeps = decides & keeps
    pending = tl.where(decides, begin, pending)
    remaining = tl.where(decides, length, remaining)

    appended = keeps.to(tl.int32) + length
    stops = tl.load(p + 12 * rows, mask=live, other=0)
    num_stops = tl.load(p + 13 * rows, mask=live, other=0)
    stopped = decides & (thought == 0) & _is_in(sampled, phrase_ptr, stops, num_stops, decides)
    max_len = tl.load(p + 11 * rows, mask=live, other=0)
    full = decides & (appended > 0) & (position + 1 + appended >= max_len)
    finish = tl.where(stopped, STOP, tl.where(full, LENGTH, finish))

    from_phrase = (remaining > 0) & (keeps == 0)
    said = tl.load(phrase_ptr + pending, mask=live & from_phrase, other=0)
    fed = tl.where(keeps, sampled, tl.where(from_phrase, said, fed))
    pending += from_phrase.to(tl.int32)
    remaining -= from_phrase.to(tl.int32)
    position += (keeps | from_phrase).to(tl.int32)

    tl.store(s, phase, mask=live)
    tl.store(s + rows, banned, mask=live)
    tl.store(s + 2 * rows, tail, mask=live)
    tl.store(s + 3 * rows, n, mask=live)
    tl.store(s + 5 * rows, waits, mask=live)
    tl.store(s + 6 * rows, pending, mask=live)
    tl.store(s + 7 * rows, remaining, mask=live)
    tl.store(s + 8 * rows, fed, mask=live)
    tl.store(s + 9 * rows, position, mask=live)
    tl.store(s + 10 * rows, finish, mask=live)

    runs = finish == 0
    at = b.to(tl.int64) * table_stride + position // BLOCK_SIZE
    block = tl.load(table_ptr + at, mask=live & runs, other=0)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    bans = (wait_len == 0) & (n < min_thinking) & (n < maximum)
    bans = (phase == THINKING) & ((banned != 0) | bans)
    tl.store(inputs, tl.where(runs, fed, 0), mask=live)
    tl.store(inputs + rows, tl.where(runs, position, 0), mask=live)
    tl.store(inputs + 2 * rows, tl.where(runs, position + 1, 0), mask=live)
    tl.store(inputs + 3 * rows, bans.to(tl.int32), mask=live)
    tl.store(slot_ptr + b, tl.where(runs, slot, null_slot), mask=live)
    tl.store(sample_position_ptr + b, (position + 1).to(tl.int64), mask=live)
    step_counter = tl.load(step_counter_ptr)
    output_tokens = output_tokens_ptr + (step_counter % num_steps).to(tl.int64) * rows + b
    tl.store(output_tokens, tl.where(decides, sampled, _IGNORED), mask=live)
    tl.debug_barrier()  # every thread has read the step_counter
    tl.store(step_counter_ptr, step_counter + 1)


def budget_step(
    sampled: Tensor,
    lanes: Tensor,
    phrases: Tensor,
    triggers: Tensor,
    newlines: Tensor,
    block_table: Tensor,
    *,
    slot_mapping: Tensor,
    sample_positions: Tensor,
    output_tokens: Tensor,
    step_counter: Tensor,
    block_size: int,
    null_slot: int,
) -> None:
    """One step of B rows, in place: takes ``sampled`` [B] int64 and leaves the next step's inputs.

    Args:
        lanes: [len(FIELDS), B] int32.
        newlines: [vocab] uint8, does the token's text end in a newline?
        block_table: [B, max_blocks] int32; the block of the next position must stand in it.
        slot_mapping, sample_positions: [B] int64, written.
        output_tokens: [steps, B] int32; the row ``step_counter`` [1] int32 modulo steps is written.
    """
    rows = sampled.shape[0]
    assert sampled.dtype == torch.int64 and 0 < rows <= launch_table.MAX_BATCH_ROWS
    assert lanes.shape == (len(FIELDS), rows) and lanes.is_contiguous()
    for column in (slot_mapping, sample_positions):
        assert column.shape == (rows,) and column.dtype == torch.int64
    for ints in (lanes, phrases, triggers, block_table, output_tokens, step_counter):
        assert ints.dtype == torch.int32
    assert newlines.dtype == torch.uint8 and block_table.stride(1) == 1
    assert output_tokens.shape[1] == rows and output_tokens.is_contiguous()
    _budget_step_kernel[(1,)](
        sampled, lanes, phrases, triggers, newlines, block_table, slot_mapping, sample_positions,
        output_tokens, step_counter, rows, len(triggers), len(newlines), block_table.stride(0),
        output_tokens.shape[0],
        null_slot, BLOCK_SIZE=block_size, ROWS=launch_table.next_power_of_2(rows),
        **launch_table.BUDGET_STEP.options(),
    )  # fmt: skip
