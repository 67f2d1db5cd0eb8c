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
from s1engine.ops import RunState, SamplingMetadata

THINKING, ANSWERING = _core.Phase.THINKING.value, _core.Phase.ANSWERING.value
STOP, LENGTH = _core.FinishReason.STOP.value, _core.FinishReason.LENGTH.value


def budget_step(sampled: Tensor, run: RunState) -> None:
    """Takes ``sampled`` [B] int64 in every lane of ``run``, in place; prepares the next step."""
    lane = run.lane
    decides = (lane("finish") == 0) & (lane("remaining") == 0)
    ids = sampled.to(torch.int32)
    thought = lane("phase") == THINKING
    keeps, begin, length = _advance(run, ids, decides)
    keeps &= decides
    lane("pending").copy_(torch.where(decides, begin, lane("pending")))
    lane("remaining").copy_(torch.where(decides, length, lane("remaining")))

    appended = torch.where(decides, keeps + length, 0)
    stopped = decides & ~thought & _stands_in(ids, run, lane("stop_begin"), lane("stop_len"))
    full = (appended > 0) & (lane("position") + 1 + appended >= lane("max_len"))
    finish = torch.where(full & ~stopped, LENGTH, torch.where(stopped, STOP, lane("finish")))
    lane("finish").copy_(finish)

    _feed(run, ids, keeps)
    step = int(run.tick) % run.ring.shape[0]
    run.ring[step] = torch.where(decides, ids, _core.NO_TOKEN)
    run.tick.add_(1)


def _advance(run: RunState, ids: Tensor, decides: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The budget's transition of the lanes that decide. Returns whether the token is kept, and
    begin and length of the phrase that follows it."""
    lane = run.lane
    n, maximum, waits = lane("thinking_tokens"), lane("max_thinking"), lane("waits_used")
    thinking = decides & (lane("phase") == THINKING)
    trigger = torch.isin(ids, run.triggers)
    below = n < lane("min_thinking")
    ignored = thinking & trigger & (below | (waits < lane("num_waits")))
    wait = ignored & (lane("wait_len") < maximum - n)
    refuse = ignored & ~wait & below & (n < maximum)
    natural = thinking & trigger & ~wait & ~refuse
    kept = thinking & ~trigger & (n < maximum)
    forced = thinking & ~trigger & (n + kept >= maximum)
    tail = torch.where(kept, run.newlines[ids.long().clamp(0, len(run.newlines) - 1)] != 0,
                       lane("tail_newline") != 0)  # fmt: skip
    newline = (lane("newline_always") != 0) | ~tail

    length = wait * lane("wait_len") + natural * lane("natural_len")
    length += forced * (lane("forced_len") + newline * lane("newline_len"))
    begin = wait * lane("wait_begin") + natural * lane("natural_begin")
    begin += forced * (lane("forced_begin") + ~newline * lane("newline_len"))

    lane("banned").copy_(torch.where(thinking, wait | refuse, lane("banned") != 0))
    tail = torch.where(wait & (lane("wait_len") > 0), lane("wait_newline") != 0, tail)
    lane("tail_newline").copy_(tail)
    n += kept + wait * lane("wait_len")
    waits += wait.to(torch.int32)
    phase = lane("phase")
    phase.copy_(torch.where(forced | natural, ANSWERING, phase))
    return kept | ~thinking, begin, length


def _stands_in(ids: Tensor, run: RunState, begin: Tensor, length: Tensor) -> Tensor:
    """Does each lane's token stand in its own list of ``phrases``?"""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for i in range(int(length.max())):
        at = (begin + i).long().clamp(max=len(run.phrases) - 1)
        found |= (i < length) & (run.phrases[at] == ids)
    return found


def _feed(run: RunState, ids: Tensor, keeps: Tensor) -> None:
    """The next input of every lane: the token kept, or one of its phrase, or the same again."""
    lane = run.lane
    speaks = (lane("remaining") > 0) & ~keeps
    said = run.phrases[lane("pending").long().clamp(max=len(run.phrases) - 1)]
    fed = torch.where(keeps, ids, torch.where(speaks, said, lane("input")))
    lane("input").copy_(fed)
    lane("pending").add_(speaks)
    lane("remaining").sub_(speaks.to(torch.int32))
    lane("position").add_(keeps | speaks)

    runs, position = lane("finish") == 0, lane("position")
    columns = (position // run.block_size).long().clamp(max=run.block_table.shape[1] - 1)
    block = run.block_table.gather(1, columns[:, None])[:, 0].long()
    slot = block * run.block_size + position % run.block_size
    below = (lane("thinking_tokens") < lane("min_thinking")) & (lane("wait_len") == 0)
    below &= lane("thinking_tokens") < lane("max_thinking")
    bans = (lane("phase") == THINKING) & ((lane("banned") != 0) | below)
    lane("input_ids").copy_(torch.where(runs, fed, 0))
    lane("positions").copy_(torch.where(runs, position, 0))
    lane("context_lens").copy_(torch.where(runs, position + 1, 0))
    lane("sample_banned").copy_(bans)
    run.slot_mapping.copy_(torch.where(runs, slot, run.null_slot))
    run.sample_positions.copy_(position + 1)


def sampling_metadata(run: RunState, filtered: bool) -> SamplingMetadata:
    """How the lanes of a run sample their next token."""
    rows = run.lane("sample_banned").nonzero()[:, 0]
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
