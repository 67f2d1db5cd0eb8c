"""What follows a sampled token, for all rows of a device batch at once: the definition in tensors.

The transition is the table of ``csrc/core/budget.hpp``. Rows are the columns of ``batch.fields``
(csrc/core/device_batch.hpp); the scheduler writes the first values. A phrase is fed one token a
step; what is sampled meanwhile is dropped. Where nothing is appended, the same token is fed again.
A row that has finished feeds token 0 into the null slot over a context of 0 tokens.
"""

import torch
from torch import Tensor

from s1engine import _core
from s1engine.ops import DeviceBatchTensors, SamplingMetadata
from s1engine.ops.torch_end_markers import advance_with_markers, end_ids

THINKING, ANSWERING = _core.Phase.THINKING.value, _core.Phase.ANSWERING.value
STOP, LENGTH = _core.FinishReason.STOP.value, _core.FinishReason.LENGTH.value


def budget_step(sampled: Tensor, batch: DeviceBatchTensors) -> None:
    """Advance every row of ``batch`` by ``sampled`` [B] int64, in place; prepare the next step."""
    field = batch.field
    advances = (field("finish") == 0) & (field("remaining") == 0)  # its sampled token counts
    ids = sampled.to(torch.int32)
    was_thinking = field("phase") == THINKING
    if batch.ends is None:
        keeps, begin, length = _advance(batch, ids, advances)
    else:
        moved = advance_with_markers(batch, ids, advances, _ends_line(batch, ids))
        keeps, begin, length = moved.keeps, moved.begin, moved.length
        field("position").sub_(torch.where(advances, moved.dropped, 0))
    keeps &= advances
    field("pending").copy_(torch.where(advances, begin, field("pending")))
    field("remaining").copy_(torch.where(advances, length, field("remaining")))

    appended = torch.where(advances, keeps + length, 0)
    is_stop = _is_in_phrases(ids, batch, field("stop_begin"), field("stop_len"))
    stopped = advances & ~was_thinking & is_stop
    full = (appended > 0) & (field("position") + 1 + appended >= field("max_len"))
    finish = torch.where(full & ~stopped, LENGTH, torch.where(stopped, STOP, field("finish")))
    field("finish").copy_(finish)

    _feed(batch, ids, keeps)
    step = int(batch.step_counter) % batch.output_tokens.shape[0]
    batch.output_tokens[step] = torch.where(advances, ids, _core.NO_TOKEN)
    batch.step_counter.add_(1)


def _advance(
    batch: DeviceBatchTensors, ids: Tensor, advances: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The budget's transition of the rows that advance. Returns whether the token is kept, and
    begin and length of the phrase that follows it."""
    field = batch.field
    n, maximum, waits = field("thinking_tokens"), field("max_thinking"), field("waits_used")
    thinking = advances & (field("phase") == THINKING)
    trigger = torch.isin(ids, batch.triggers)
    below = n < field("min_thinking")
    ignored = thinking & trigger & (below | (waits < field("num_waits")))
    wait = ignored & (field("wait_len") < maximum - n)
    refuse = ignored & ~wait & below & (n < maximum)
    natural = thinking & trigger & ~wait & ~refuse
    kept = thinking & ~trigger & (n < maximum)
    forced = thinking & ~trigger & (n + kept >= maximum)
    tail = torch.where(kept, _ends_line(batch, ids), field("tail_newline") != 0)
    newline = (field("newline_always") != 0) | ~tail

    length = wait * field("wait_len") + natural * field("natural_len")
    length += forced * (field("forced_len") + newline * field("newline_len"))
    begin = wait * field("wait_begin") + natural * field("natural_begin")
    begin += forced * (field("forced_begin") + ~newline * field("newline_len"))

    field("banned").copy_(torch.where(thinking, wait | refuse, field("banned") != 0))
    tail = torch.where(wait & (field("wait_len") > 0), field("wait_newline") != 0, tail)
    field("tail_newline").copy_(tail)
    n += kept + wait * field("wait_len")
    waits += wait.to(torch.int32)
    phase = field("phase")
    phase.copy_(torch.where(forced | natural, ANSWERING, phase))
    return kept | ~thinking, begin, length


def _ends_line(batch: DeviceBatchTensors, ids: Tensor) -> Tensor:
    return batch.newlines[ids.long().clamp(0, len(batch.newlines) - 1)] != 0


def _is_in_phrases(ids: Tensor, batch: DeviceBatchTensors, begin: Tensor, length: Tensor) -> Tensor:
    """Whether each row's token is in its own slice of ``phrases``."""
    contained = torch.zeros_like(ids, dtype=torch.bool)
    for i in range(int(length.max())):
        at = (begin + i).long().clamp(max=len(batch.phrases) - 1)
        contained |= (i < length) & (batch.phrases[at] == ids)
    return contained


def _feed(batch: DeviceBatchTensors, ids: Tensor, keeps: Tensor) -> None:
    """Write the next input of every row: the kept token, a phrase's next token, or the last one."""
    field = batch.field
    from_phrase = (field("remaining") > 0) & ~keeps
    phrase_token = batch.phrases[field("pending").long().clamp(max=len(batch.phrases) - 1)]
    fed = torch.where(keeps, ids, torch.where(from_phrase, phrase_token, field("input")))
    field("input").copy_(fed)
    field("pending").add_(from_phrase)
    field("remaining").sub_(from_phrase.to(torch.int32))
    field("position").add_(keeps | from_phrase)

    runs, position = field("finish") == 0, field("position")
    columns = (position // batch.block_size).long().clamp(max=batch.block_table.shape[1] - 1)
    block = batch.block_table.gather(1, columns[:, None])[:, 0].long()
    slot = block * batch.block_size + position % batch.block_size
    below = (field("thinking_tokens") < field("min_thinking")) & (field("wait_len") == 0)
    below &= field("thinking_tokens") < field("max_thinking")
    bans = (field("phase") == THINKING) & ((field("banned") != 0) | below)
    field("input_ids").copy_(torch.where(runs, fed, 0))
    field("positions").copy_(torch.where(runs, position, 0))
    field("context_lens").copy_(torch.where(runs, position + 1, 0))
    field("sample_banned").copy_(bans * (1 + field("match")))
    batch.slot_mapping.copy_(torch.where(runs, slot, batch.null_slot))
    batch.sample_positions.copy_(position + 1)


def sampling_metadata(batch: DeviceBatchTensors, filtered: bool) -> SamplingMetadata:
    """How the rows of a device batch sample their next token."""
    rows = batch.field("sample_banned").nonzero()[:, 0]
    triggers = batch.triggers.long()
    banned = (rows.repeat_interleave(len(triggers)), triggers.repeat(len(rows)))
    if batch.ends is not None and len(rows):
        row_of, ids = end_ids(batch).nonzero(as_tuple=True)
        banned = (row_of, ids)
    return SamplingMetadata(
        temperature=batch.temperature,
        top_k=batch.top_k,
        top_p=batch.top_p,
        min_p=batch.min_p,
        seeds=batch.seeds,
        positions=batch.sample_positions,
        all_greedy=not batch.temperature.any(),
        filtered=filtered,
        banned=banned if len(rows) else None,
    )
