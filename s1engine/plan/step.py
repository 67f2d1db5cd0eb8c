"""What a step is made of, as far as it decides how long the step takes.

The same figures are read from a batch that is simulated and from one that is measured.
"""

from dataclasses import dataclass
from typing import Protocol

from s1engine.runner.input_batch import InputBatch


@dataclass(frozen=True, slots=True)
class Step:
    """Sizes of one step. A row with one pending token decodes, one with more extends."""

    tokens: float
    samples: float
    """Rows whose logits are wanted."""
    decode_context: float = 0
    """Cached tokens that decoding rows read, in all."""
    extend_context: float = 0
    """Cached tokens that extending rows read, in all."""
    extend_pairs: float = 0
    """Pairs of a query and a key that it sees, over the extending rows."""
    admitted: float = 0
    """Sequences that the step is the first for."""

    @property
    def extends(self) -> bool:
        return self.extend_context > 0

    @property
    def mixed(self) -> bool:
        return self.extend_context > 0 and self.decode_context > 0

    @classmethod
    def of(cls, batch: InputBatch, admitted: int = 0) -> "Step":
        """The step that stands in ``batch``, on the CPU."""
        inputs, core = batch.inputs(), batch.core
        context = inputs.attention.context_lens.numpy().astype(int)
        if core.max_seqlen_q == 1:
            return cls(core.num_tokens, core.num_samples, context.sum().item(), admitted=admitted)
        cu = inputs.attention.cu_seqlens_q.numpy()
        queries = cu[1:] - cu[:-1]
        decodes = queries == 1
        pairs = queries * context - queries * (queries - 1) // 2
        return cls(
            tokens=core.num_tokens,
            samples=core.num_samples,
            decode_context=context[decodes].sum().item(),
            extend_context=context[~decodes].sum().item(),
            extend_pairs=pairs[~decodes].sum().item(),
            admitted=admitted,
        )


def decoding(rows: float, context: float) -> Step:
    """``rows`` sequences with ``context`` tokens each, one token more for each."""
    return Step(rows, rows, rows * context)


class StepTime(Protocol):
    """How long steps take."""

    def seconds(self, step: Step) -> float:
        """Of one step."""


def prefill_steps(prompt: int, chunk: int) -> list[Step]:
    """The steps that a prompt of ``prompt`` tokens takes alone, ``chunk`` tokens at a time; the
    last samples."""
    steps = []
    for begin in range(0, prompt, chunk):
        tokens = min(chunk, prompt - begin)
        end = begin + tokens
        samples, admitted = int(end == prompt), int(begin == 0)
        if tokens == 1:
            steps.append(Step(1, samples, decode_context=end, admitted=admitted))
        else:
            pairs = tokens * end - tokens * (tokens - 1) // 2
            steps.append(Step(tokens, samples, 0, end, pairs, admitted))
    return steps
