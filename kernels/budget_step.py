"""What follows a sampled token, computed on the device: the thinking budget and the next input.

The transition is the table of ``csrc/core/budget.hpp``, bit for bit. In its letters (n thinking
tokens, w waits used), for a row that is THINKING:

    ignored = n < min or w < num_waits             fits = n + |wait| < max
    trigger:  ignored and fits -> the wait phrase; ignored, n < min < max -> nothing; else the
              natural end
    other:    n < max -> keep it, n += 1;          n >= max now -> the forced end

A phrase is fed one token a step; what is sampled meanwhile is dropped. Where nothing is appended,
the same token is fed again with its triggers banned. A row that has finished feeds token 0 into the
null slot over a context of 0 tokens until the host retires it.

Formats whose ends are markers of several tokens take ``end_markers`` instead of ``_advance``; the
others compile to the same code as without them.

``row_fields`` is the layout of a row; the scheduler writes the first values. The host follows from
``output_tokens`` alone. Knows rows of the device batch, not sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels import row_fields as field
from s1engine.kernels.end_markers import advance_with_markers
from s1engine.kernels.pdl import grid_dependency_wait, launch_dependents


@triton.jit
def _load(row_ptr, FIELD: tl.constexpr, rows, live):
    """A field of every row, [BLOCK_B]; ``row_ptr`` points to field 0 of each row."""
    return tl.load(row_ptr + FIELD * rows, mask=live, other=0)


@triton.jit
def _load_parameter(parameter_ptr, FIELD: tl.constexpr, rows, live):
    """The same relative to the first parameter: 56 registers for one row instead of 64."""
    return _load(parameter_ptr, FIELD - field.MIN_THINKING, rows, live)


@triton.jit
def _store(row_ptr, FIELD: tl.constexpr, rows, live, value):
    tl.store(row_ptr + FIELD * rows, value, mask=live)


@triton.jit
def _is_in(token, list_ptr, begin, size, live):
    """Whether each row's token is in its list list_ptr[begin:begin + size]."""
    contained = token < token  # false
    for i in range(tl.max(size)):
        inside = live & (i < size)
        entry = tl.load(list_ptr + begin + i, mask=inside, other=0)
        contained = contained | (inside & (entry == token))
    return contained


@triton.jit
def _advance(
    phase, banned, tail, n, maximum, waits, min_thinking, num_waits, wait_begin, wait_len,
    wait_newline, natural_begin, natural_len, forced_begin, newline_len, forced_len,
    newline_always, trigger, ends_line,
):  # fmt: skip
    """One transition of every row. ``trigger``: the sampled token ends thinking; ``ends_line``: its
    text ends in a newline.

    Returns the new phase, banned, tail, n and waits, whether the token is kept, and begin and
    length of the phrase that follows it.
    """
    thinking = phase == field.THINKING
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
    phase = tl.where(forced | natural, field.ANSWERING, phase)
    return phase, banned, tail, n, waits, kept | (thinking == 0), begin, length


@triton.jit(do_not_specialize=["rows"])
def _budget_step_kernel(
    sampled_ptr,  # [B] int64
    fields_ptr,  # [NUM_FIELDS, B] int32
    phrase_ptr,  # int32, phrases and stop tokens of all rows
    trigger_ptr,  # [num_triggers] int32
    newline_ptr,  # [vocab] uint8
    table_ptr,  # [B, max_blocks] int32
    slot_ptr,  # [B] int64
    sample_position_ptr,  # [B] int64
    output_tokens_ptr,  # [num_steps, B] int32
    step_counter_ptr,  # [1] int32
    next_ptr,  # [states, marker_vocab] uint8; this and the next two are read if MARKERS
    depth_ptr,  # [states] int32
    token_len_ptr,  # [marker_vocab] uint8
    rows,
    num_triggers,
    vocab,
    table_stride,
    num_steps,
    null_slot,
    marker_vocab,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    MARKERS: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)  # a single program holds no SM that the next kernel needs
    grid_dependency_wait(PDL)
    b = tl.arange(0, BLOCK_B)
    live = b < rows
    row = fields_ptr + b
    parameters = row + field.MIN_THINKING * rows
    phase = _load(row, field.PHASE, rows, live)
    banned = _load(row, field.BANNED, rows, live)
    tail = _load(row, field.TAIL_NEWLINE, rows, live)
    n = _load(row, field.THINKING_TOKENS, rows, live)
    maximum = _load(row, field.MAX_THINKING, rows, live)
    waits = _load(row, field.WAITS_USED, rows, live)
    pending = _load(row, field.PENDING, rows, live)
    remaining = _load(row, field.REMAINING, rows, live)
    fed = _load(row, field.INPUT, rows, live)
    position = _load(row, field.POSITION, rows, live)
    finish = _load(row, field.FINISH, rows, live)
    sampled = tl.load(sampled_ptr + b, mask=live, other=0).to(tl.int32)

    advances = live & (finish == 0) & (remaining == 0)  # rows whose sampled token counts
    was_thinking = phase == field.THINKING
    known = advances & (sampled >= 0) & (sampled < vocab)
    ends_line = tl.load(newline_ptr + sampled, mask=known, other=0) != 0
    zero = tl.zeros([BLOCK_B], tl.int32)
    trigger = _is_in(sampled, trigger_ptr, zero, zero + num_triggers, advances)
    wait_len = _load_parameter(parameters, field.WAIT_LEN, rows, live)
    min_thinking = _load_parameter(parameters, field.MIN_THINKING, rows, live)
    num_waits = _load_parameter(parameters, field.NUM_WAITS, rows, live)
    wait_begin = _load_parameter(parameters, field.WAIT_BEGIN, rows, live)
    wait_newline = _load_parameter(parameters, field.WAIT_NEWLINE, rows, live)
    natural_begin = _load_parameter(parameters, field.NATURAL_BEGIN, rows, live)
    natural_len = _load_parameter(parameters, field.NATURAL_LEN, rows, live)
    forced_begin = _load_parameter(parameters, field.FORCED_BEGIN, rows, live)
    newline_len = _load_parameter(parameters, field.NEWLINE_LEN, rows, live)
    forced_len = _load_parameter(parameters, field.FORCED_LEN, rows, live)
    newline_always = _load_parameter(parameters, field.NEWLINE_ALWAYS, rows, live)
    if MARKERS:
        match = _load(row, field.MATCH, rows, live)
        held = _load(row, field.HELD, rows, live)
        starts = _load(row, field.STARTS, rows, live)
        known = known & (sampled < marker_vocab)
        entry = next_ptr + match.to(tl.int64) * marker_vocab + sampled
        next_state = tl.load(entry, mask=known, other=0).to(tl.int32)
        token_len = tl.load(token_len_ptr + sampled, mask=known, other=1).to(tl.int32)
        (
            new_phase, new_banned, new_tail, new_n, new_waits, new_match, new_held, new_starts,
            keeps, begin, length, dropped,
        ) = advance_with_markers(
            phase, banned, tail, n, maximum, waits, min_thinking, num_waits, wait_begin, wait_len,
            wait_newline, natural_begin, natural_len, forced_begin, newline_len, forced_len,
            newline_always, trigger, ends_line, match, held, starts,
            _load_parameter(parameters, field.AFTER_MARKER_BEGIN, rows, live),
            _load_parameter(parameters, field.AFTER_MARKER_LEN, rows, live),
            next_state, token_len, depth_ptr,
        )  # fmt: skip
        match = tl.where(advances, new_match, match)
        _store(row, field.MATCH, rows, live, match)
        _store(row, field.HELD, rows, live, tl.where(advances, new_held, held))
        _store(row, field.STARTS, rows, live, tl.where(advances, new_starts, starts))
        position -= tl.where(advances, dropped, 0)
    else:
        new_phase, new_banned, new_tail, new_n, new_waits, keeps, begin, length = _advance(
            phase, banned, tail, n, maximum, waits, min_thinking, num_waits, wait_begin, wait_len,
            wait_newline, natural_begin, natural_len, forced_begin, newline_len, forced_len,
            newline_always, trigger, ends_line,
        )  # fmt: skip
    phase = tl.where(advances, new_phase, phase)
    banned = tl.where(advances, new_banned, banned)
    tail = tl.where(advances, new_tail, tail)
    n = tl.where(advances, new_n, n)
    waits = tl.where(advances, new_waits, waits)
    keeps = advances & keeps
    pending = tl.where(advances, begin, pending)
    remaining = tl.where(advances, length, remaining)

    appended = keeps.to(tl.int32) + length
    stop_begin = _load_parameter(parameters, field.STOP_BEGIN, rows, live)
    stop_len = _load_parameter(parameters, field.STOP_LEN, rows, live)
    is_stop = _is_in(sampled, phrase_ptr, stop_begin, stop_len, advances)
    stopped = advances & (was_thinking == 0) & is_stop
    max_len = _load_parameter(parameters, field.MAX_LEN, rows, live)
    full = advances & (appended > 0) & (position + 1 + appended >= max_len)
    finish = tl.where(stopped, field.STOP, tl.where(full, field.LENGTH, finish))

    from_phrase = (remaining > 0) & (keeps == 0)
    phrase_token = tl.load(phrase_ptr + pending, mask=live & from_phrase, other=0)
    fed = tl.where(keeps, sampled, tl.where(from_phrase, phrase_token, fed))
    pending += from_phrase.to(tl.int32)
    remaining -= from_phrase.to(tl.int32)
    position += (keeps | from_phrase).to(tl.int32)

    _store(row, field.PHASE, rows, live, phase)
    _store(row, field.BANNED, rows, live, banned)
    _store(row, field.TAIL_NEWLINE, rows, live, tail)
    _store(row, field.THINKING_TOKENS, rows, live, n)
    _store(row, field.WAITS_USED, rows, live, waits)
    _store(row, field.PENDING, rows, live, pending)
    _store(row, field.REMAINING, rows, live, remaining)
    _store(row, field.INPUT, rows, live, fed)
    _store(row, field.POSITION, rows, live, position)
    _store(row, field.FINISH, rows, live, finish)

    runs = finish == 0
    at = b.to(tl.int64) * table_stride + position // BLOCK_SIZE
    block = tl.load(table_ptr + at, mask=live & runs, other=0)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    bans = (wait_len == 0) & (n < min_thinking) & (n < maximum)
    bans = (phase == field.THINKING) & ((banned != 0) | bans)
    _store(row, field.INPUT_IDS, rows, live, tl.where(runs, fed, 0))
    _store(row, field.POSITIONS, rows, live, tl.where(runs, position, 0))
    _store(row, field.CONTEXT_LENS, rows, live, tl.where(runs, position + 1, 0))
    ban = bans.to(tl.int32)
    if MARKERS:
        ban *= 1 + match
    _store(row, field.SAMPLE_BANNED, rows, live, ban)
    tl.store(slot_ptr + b, tl.where(runs, slot, null_slot), mask=live)
    tl.store(sample_position_ptr + b, (position + 1).to(tl.int64), mask=live)
    step = tl.load(step_counter_ptr)
    out = output_tokens_ptr + (step % num_steps).to(tl.int64) * rows + b
    tl.store(out, tl.where(advances, sampled, field.NO_TOKEN), mask=live)
    tl.debug_barrier()  # every thread has read the counter
    tl.store(step_counter_ptr, step + 1)


def budget_step(
    sampled: Tensor,
    fields: Tensor,
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
    markers: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Advance B rows by ``sampled`` [B] int64, in place, and write the inputs of the next step.

    Args:
        fields: [NUM_FIELDS, B] int32.
        newlines: [V] uint8, 1 where the token's text ends in a newline.
        block_table: [B, max_blocks] int32; holds the block of the next position.
        slot_mapping, sample_positions: [B] int64, written.
        markers: the end matcher of a format that has one: next states [states, V] uint8, depths
            [states] int32, bytes of each token [V] uint8, 1 to 31.
        output_tokens: [steps, B] int32; row ``step_counter`` [1] int32 modulo steps is written.
    """
    rows = sampled.shape[0]
    assert sampled.dtype == torch.int64 and 0 < rows <= launch_table.MAX_BATCH_ROWS
    assert fields.shape == (field.NUM_FIELDS, rows) and fields.is_contiguous()
    for column in (slot_mapping, sample_positions):
        assert column.shape == (rows,) and column.dtype == torch.int64
    for ints in (fields, phrases, triggers, block_table, output_tokens, step_counter):
        assert ints.dtype == torch.int32
    assert newlines.dtype == torch.uint8 and block_table.stride(1) == 1
    assert output_tokens.shape[1] == rows and output_tokens.is_contiguous()
    next_state, depths, token_lens = markers or (newlines, triggers, newlines)
    assert next_state.dtype == token_lens.dtype == torch.uint8 and depths.dtype == torch.int32
    assert next_state.is_contiguous()
    block_b = launch_table.next_power_of_2(rows)
    _budget_step_kernel[(1,)](
        sampled, fields, phrases, triggers, newlines, block_table, slot_mapping, sample_positions,
        output_tokens, step_counter, next_state, depths, token_lens, rows, len(triggers),
        len(newlines), block_table.stride(0), output_tokens.shape[0], null_slot, len(token_lens),
        BLOCK_SIZE=block_size, BLOCK_B=block_b, MARKERS=markers is not None,
        **launch_table.budget_step_launch(block_b).kwargs(),
    )  # fmt: skip
