"""The budget's transition for formats whose end is a marker of several tokens.

The table is that of ``csrc/core/budget.hpp``, bit for bit; ``csrc/core/end_matcher.hpp`` says how
tokens match a marker. In their letters (n thinking tokens, h of them held, w waits used):

    state = next[match][token]          complete: state >= 128, with state - 128 bytes before it
    end:    a trigger, or a complete marker that is in m of the held tokens; t = n + h - m
            ignored and t + |wait| < max -> drop m, the wait phrase; ignored, t < min -> nothing;
            else the natural end
    other:  n + h >= max -> the forced end;  else keep it; n + h >= max now -> the forced end,
            which drops what is held, except for what the minimum lacks

Knows registers of one row each; ``budget_step`` loads and stores them.
"""

import triton
import triton.language as tl

from s1engine.kernels import row_fields as field


@triton.jit
def count_tokens(starts, num_bytes):
    """Number of tokens that hold the last ``num_bytes`` bytes. Bit i of ``starts``: a token starts
    i bytes before the last one."""
    one = num_bytes * 0 + 1
    inside = starts & ((one << tl.maximum(num_bytes - 1, 0)) - 1)
    inside = inside - ((inside >> 1) & 0x55555555)
    inside = (inside & 0x33333333) + ((inside >> 2) & 0x33333333)
    inside = (inside + (inside >> 4)) & 0x0F0F0F0F
    inside = inside + (inside >> 8)
    count = ((inside + (inside >> 16)) & 63) + 1
    return tl.where(num_bytes > 0, count, 0)


@triton.jit
def advance_with_markers(
    phase, banned, tail, n, maximum, waits, min_thinking, num_waits, wait_begin, wait_len,
    wait_newline, natural_begin, natural_len, forced_begin, newline_len, forced_len,
    newline_always, trigger, ends_line, match, held, starts, after_begin, after_len, next_state,
    token_len, depth_ptr,
):  # fmt: skip
    """One transition of every row. ``next_state``: entry of the matcher's table for the sampled
    token, ``token_len`` its bytes; ``depth_ptr`` [states] int32: bytes that a state has matched.

    Returns the new phase, banned, tail, n, waits, match, held and starts, whether the token is
    kept, begin and length of the phrase that follows it, and the number of dropped tokens.
    """
    thinking = phase == field.THINKING
    ends, other = thinking & trigger, thinking & (trigger == 0)
    over = other & (n + held >= maximum)
    completes = other & (over == 0) & (next_state >= field.COMPLETE)
    before = count_tokens(starts, tl.maximum(next_state - field.COMPLETE, 0))
    ending = tl.where(ends, held, tl.where(completes, before, 0))
    thought = n + held - ending
    below = thought < min_thinking
    ignored = (ends | completes) & (below | (waits < num_waits))
    wait = ignored & (wait_len < maximum - thought)
    refuse = ignored & (wait == 0) & below & (thought < maximum)
    natural = (ends | completes) & (wait == 0) & (refuse == 0)
    replaced = wait & (wait_len > 0)  # an empty wait text appends nothing

    kept = other & (over == 0) & (completes == 0)
    state = tl.where(kept, next_state, 0)
    new_starts = ((starts << token_len) | (1 << (token_len - 1))) & 0x7FFFFFFF
    new_starts = tl.where(state > 0, new_starts, 0)
    new_held = count_tokens(new_starts, tl.load(depth_ptr + state))
    released = tl.where(kept, held + 1 - new_held, 0)
    new_tail = tl.where(released > 0, ((new_held == 0) & ends_line).to(tl.int32), tail)
    thought = tl.where(kept, n + released, tl.where(over, n, thought))
    half = tl.where(kept, new_held, held)
    forced = over | (kept & (thought + half >= maximum))
    lacking = tl.maximum(tl.minimum(min_thinking, maximum) - thought, 0)
    saved = tl.where(forced, tl.minimum(lacking, half), 0)
    new_tail = tl.where(saved > 0, 0, new_tail)
    newline = (newline_always != 0) | (new_tail == 0)
    half_dropped = tl.where(forced, half - saved, 0)
    cut = forced & kept & (half_dropped > 0)  # the sampled token itself is dropped
    dropped = half_dropped - cut.to(tl.int32)
    dropped = tl.where(replaced, ending, tl.where(natural & ends, held, dropped))

    after = natural & completes
    length = tl.where(wait, wait_len, tl.where(after, after_len, 0))
    length = tl.where(natural & ends, natural_len, length)
    length = tl.where(forced, forced_len + tl.where(newline, newline_len, 0), length)
    begin = tl.where(wait, wait_begin, tl.where(after, after_begin, natural_begin))
    begin = tl.where(forced, forced_begin + tl.where(newline, 0, newline_len), begin)

    goes_on = kept & (forced == 0)
    unchanged = (thinking == 0) | refuse | (wait & (replaced == 0))
    match = tl.where(unchanged, match, tl.where(goes_on, state, 0))
    held = tl.where(unchanged, held, tl.where(goes_on, new_held, 0))
    starts = tl.where(unchanged, starts, tl.where(goes_on, new_starts, 0))
    banned = tl.where(released > 0, 0, banned)
    banned = tl.where(wait | refuse, 1, banned)
    new_tail = tl.where(replaced, wait_newline, new_tail)
    tail = tl.where(thinking, new_tail, tail)
    n = tl.where(unchanged, n, thought + saved + tl.where(replaced, wait_len, 0))
    waits += wait.to(tl.int32)
    phase = tl.where(forced | natural, field.ANSWERING, phase)
    keeps = (kept & (cut == 0)) | after | (thinking == 0)
    return (
        phase, banned, tail, n, waits, match, held, starts, keeps, begin, length, dropped,
    )  # fmt: skip
