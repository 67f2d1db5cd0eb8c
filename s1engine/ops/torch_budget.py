"""What follows a sampled token, for all lanes of a run at once: the definition in tensors.

The transition is the table of ``csrc/core/budget.hpp``. Lanes are the columns of one int32 matrix,
their fields its rows, written first by ``Scheduler.begin_multi_step``
(csrc/core/device_batch.hpp). A phrase is fed one token a step, and while one is pending what is
sampled means nothing; where nothing is appended the same token is fed again. A lane that has
finished feeds token 0 into the null slot over a context of 0 tokens.
"""

import torch
from torch import Tensor

from s1engine import _core
from s1engine.ops import DeviceBatchTensors, SamplingMetadata

THINKING, ANSWERING = _core.Phase.THINKING.value, _core.Phase.ANSWERING.value
STOP, LENGTH = _core.FinishReason.STOP.value, _core.FinishReason.LENGTH.value


def budget_step(sampled: Tensor, run: DeviceBatchTensors) -> None:
    """Takes ``sampled`` [B] int64 in every lane of ``run``, in place; prepares the next step."""
    field = run.field
    decides = (field("finish") == 0) & (field("remaining") == 0)
    ids = sampled.to(torch.int32)
    thought = field("phase") == THINKING
    keeps, begin, length = _advance(run, ids, decides)
    keeps &= decides
    field("pending").copy_(torch.where(decides, begin, field("pending")))
    field("remaining").copy_(torch.where(decides, length, field("remaining")))

    appended = torch.where(decides, keeps + length, 0)
    stopped = decides & ~thought & _stands_in(ids, run, field("stop_begin"), field("stop_len"))
    full = (appended > 0) & (field("position") + 1 + appended >= field("max_len"))
    finish = torch.where(full & ~stopped, LENGTH, torch.where(stopped, STOP, field("finish")))
    field("finish").copy_(finish)

    _feed(run, ids, keeps)
    step = int(run.step_counter) % run.output_tokens.shape[0]
    run.output_tokens[step] = torch.where(decides, ids, _core.NO_TOKEN)
    run.step_counter.add_(1)


def _advance(
    run: DeviceBatchTensors, ids: Tensor, decides: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The budget's transition of the lanes that decide. Returns whether the token is kept, and
    begin and length of the phrase that follows it."""
    field = run.field
    n, maximum, waits = field("thinking_tokens"), field("max_thinking"), field("waits_used")
    thinking = decides & (field("phase") == THINKING)
    trigger = torch.isin(ids, run.triggers)
    below = n < field("min_thinking")
    ignored = thinking & trigger & (below | (waits < field("num_waits")))
    wait = ignored & (field("wait_len") < maximum - n)
    refuse = ignored & ~wait & below & (n < maximum)
    natural = thinking & trigger & ~wait & ~refuse
    kept = thinking & ~trigger & (n < maximum)
    forced = thinking & ~trigger & (n + kept >= maximum)
    tail = torch.where(kept, run.newlines[ids.long().clamp(0, len(run.newlines) - 1)] != 0,
                       field("tail_newline") != 0)  # fmt: skip
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


def _stands_in(ids: Tensor, run: DeviceBatchTensors, begin: Tensor, length: Tensor) -> Tensor:
    """Does each lane's token stand in its own list of ``phrases``?"""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for i in range(int(length.max())):
        at = (begin + i).long().clamp(max=len(run.phrases) - 1)
        found |= (i < length) & (run.phrases[at] == ids)
    return found


def _feed(run: DeviceBatchTensors, ids: Tensor, keeps: Tensor) -> None:
    """The next input of every lane: the token kept, or one of its phrase, or the same again."""
    field = run.field
    speaks = (field("remaining") > 0) & ~keeps
    said = run.phrases[field("pending").long().clamp(max=len(run.phrases) - 1)]
    fed = torch.where(keeps, ids, torch.where(speaks, said, field("input")))
    field("input").copy_(fed)
    field("pending").add_(speaks)
    field("remaining").sub_(speaks.to(torch.int32))
    field("position").add_(keeps | speaks)

    runs, position = field("finish") == 0, field("position")
    columns = (position // run.block_size).long().clamp(max=run.block_table.shape[1] - 1)
    block = run.block_table.gather(1, columns[:, None])[:, 0].long()
    slot = block * run.block_size + position % run.block_size
    below = (field("thinking_tokens") < field("min_thinking")) & (field("wait_len") == 0)
    below &= field("thinking_tokens") < field("max_thinking")
    bans = (field("phase") == THINKING) & ((field("banned") != 0) | below)
    field("input_ids").copy_(torch.where(runs, fed, 0))
    field("positions").copy_(torch.where(runs, position, 0))
    field("context_lens").copy_(torch.where(runs, position + 1, 0))
    field("sample_banned").copy_(bans)
    run.slot_mapping.copy_(torch.where(runs, slot, run.null_slot))
    run.sample_positions.copy_(position + 1)


def sampling_metadata(run: DeviceBatchTensors, filtered: bool) -> SamplingMetadata:
    """How the lanes of a run sample their next token."""
    rows = run.field("sample_banned").nonzero()[:, 0]
    triggers = run.triggers.long()
    banned = (rows.repeat_interleave(len(triggers)), triggers.repeat(len(rows)))
    return SamplingMetadata(
        temperature=run.temperature,
        top_k=run.top_k,
        top_p=run.top_p,
        min_p=run.min_p,
        seeds=run.seeds,
        positions=run.sample_positions,
        all_greedy=not run.temperature.any(),
        filtered=filtered,
        banned=banned if len(rows) else None,
    )
