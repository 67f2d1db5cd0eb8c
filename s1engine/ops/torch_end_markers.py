"""The budget's transition for formats with end markers of several tokens, in tensors.

The transition is the table of ``csrc/core/budget.hpp``; how tokens match a marker is that of
``csrc/core/end_matcher.hpp``. Formats without end markers never come here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from s1engine import _core
from s1engine.ops import DeviceBatchTensors

THINKING, ANSWERING = _core.Phase.THINKING.value, _core.Phase.ANSWERING.value
STARTS_MASK = 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class Transition:
    """What a step does to each row: tensors [B]. Drops ``dropped`` tokens from the end, appends the
    sampled token if ``keeps``, and feeds phrases[begin:begin + length]."""

    keeps: Tensor  # bool
    begin: Tensor  # int32
    length: Tensor
    dropped: Tensor


def count_tokens(starts: Tensor, num_bytes: Tensor) -> Tensor:
    """Number of tokens that hold the last ``num_bytes`` bytes, each [B] int32."""
    inside = starts & ((1 << (num_bytes - 1).clamp(min=0)) - 1)
    inside = inside - ((inside >> 1) & 0x55555555)
    inside = (inside & 0x33333333) + ((inside >> 2) & 0x33333333)
    inside = (inside + (inside >> 4)) & 0x0F0F0F0F
    inside = inside + (inside >> 8)
    count = ((inside + (inside >> 16)) & 63) + 1
    return torch.where(num_bytes > 0, count, 0)


def advance_with_markers(
    batch: DeviceBatchTensors, ids: Tensor, advances: Tensor, ends_line: Tensor
) -> Transition:
    """One transition of the rows that advance, in place. ``ends_line``: the token's text ends in a
    newline."""
    field, ends = batch.field, batch.ends
    assert ends is not None
    n, maximum, waits = field("thinking_tokens"), field("max_thinking"), field("waits_used")
    match, held, starts = field("match"), field("held"), field("starts")
    minimum, wait_len = field("min_thinking"), field("wait_len")
    thinking = advances & (field("phase") == THINKING)
    trigger = thinking & torch.isin(ids, batch.triggers)
    known = (ids >= 0) & (ids < ends.next_state.shape[1])
    column = torch.where(known, ids, 0).long()
    state = torch.where(known, ends.next_state[match.long(), column].to(torch.int32), 0)

    over = thinking & ~trigger & (n + held >= maximum)
    completes = thinking & ~trigger & ~over & (state >= _core.END_COMPLETE)
    before = count_tokens(starts, (state - _core.END_COMPLETE).clamp(min=0))
    ending = torch.where(trigger, held, torch.where(completes, before, 0))
    thought = n + held - ending
    below = thought < minimum
    ignored = (trigger | completes) & (below | (waits < field("num_waits")))
    wait = ignored & (wait_len < maximum - thought)
    refuse = ignored & ~wait & below & (thought < maximum)
    natural = (trigger | completes) & ~wait & ~refuse
    replaced = wait & (wait_len > 0)  # an empty wait text appends nothing

    kept = thinking & ~trigger & ~over & ~completes
    state = torch.where(kept, state, 0)
    token_len = ends.token_lens[column].to(torch.int32)
    new_starts = ((starts << token_len) | (1 << (token_len - 1))) & STARTS_MASK
    new_starts = torch.where(state > 0, new_starts, 0)
    new_held = count_tokens(new_starts, ends.depths[state.long()])
    released = torch.where(kept, held + 1 - new_held, 0)
    tail = field("tail_newline") != 0
    tail = torch.where(released > 0, (new_held == 0) & ends_line, tail)
    thought = torch.where(kept, n + released, torch.where(over, n, thought))
    half = torch.where(kept, new_held, held)
    forced = over | (kept & (thought + half >= maximum))
    lacking = (torch.minimum(minimum, maximum) - thought).clamp(min=0)
    saved = torch.where(forced, torch.minimum(lacking, half), 0)
    tail &= saved == 0
    newline = (field("newline_always") != 0) | ~tail
    half_dropped = torch.where(forced, half - saved, 0)
    cut = forced & kept & (half_dropped > 0)  # the sampled token itself is dropped
    dropped = half_dropped - cut.to(torch.int32)
    dropped += torch.where(replaced, ending, torch.where(natural & trigger, held, 0))

    after_marker = natural & ~trigger
    length = wait * wait_len + forced * (field("forced_len") + newline * field("newline_len"))
    length += (natural & trigger) * field("natural_len")
    length += after_marker * field("after_marker_len")
    begin = wait * field("wait_begin")
    begin += forced * (field("forced_begin") + ~newline * field("newline_len"))
    begin += (natural & trigger) * field("natural_begin")
    begin += after_marker * field("after_marker_begin")

    goes_on = kept & ~forced
    unchanged = ~thinking | refuse | (wait & ~replaced)
    match.copy_(torch.where(unchanged, match, state * goes_on))
    held.copy_(torch.where(unchanged, held, new_held * goes_on))
    starts.copy_(torch.where(unchanged, starts, new_starts * goes_on))
    banned = torch.where(released > 0, False, field("banned") != 0)
    field("banned").copy_(banned | wait | refuse)
    tail = torch.where(replaced, field("wait_newline") != 0, tail)
    field("tail_newline").copy_(torch.where(thinking, tail, field("tail_newline") != 0))
    counted = thought + saved + wait_len * replaced
    n.copy_(torch.where(thinking & ~refuse & ~(wait & ~replaced), counted, n))
    waits += wait.to(torch.int32)
    phase = field("phase")
    phase.copy_(torch.where(forced | natural, ANSWERING, phase))
    keeps = ~thinking | (kept & ~cut) | after_marker
    return Transition(keeps, begin, length, dropped)


def end_ids(batch: DeviceBatchTensors) -> Tensor:
    """Which ids the rows must not sample, [B, V] bool, where end markers are part of the format."""
    assert batch.ends is not None
    code = batch.field("sample_banned")
    completes = batch.ends.next_state[(code - 1).clamp(min=0).long()] >= _core.END_COMPLETE
    completes[:, batch.triggers.long()] = True
    return completes & (code > 0)[:, None]
