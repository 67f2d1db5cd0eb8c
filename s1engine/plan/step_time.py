"""What a step is made of, as far as it decides how long the step takes.

The same figures are read from a batch that is simulated and from one that is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from s1engine.plan import hardware
from s1engine.plan.hardware import Gpu
from s1engine.plan.placement import Footprint
from s1engine.runner.input_batch import InputBatch


@dataclass(frozen=True, slots=True)
class StepShape:
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
    def of(cls, batch: InputBatch, admitted: int = 0) -> "StepShape":
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


def decoding(rows: float, context: float) -> StepShape:
    """``rows`` sequences with ``context`` tokens each, one token more for each."""
    return StepShape(rows, rows, rows * context)


class StepTimeModel(Protocol):
    """How long steps take."""

    def seconds(self, step: StepShape) -> float:
        """Of one step."""


def prefill_steps(prompt: int, chunk: int) -> list[StepShape]:
    """The steps that a prompt of ``prompt`` tokens takes alone, ``chunk`` tokens at a time; the
    last samples."""
    steps = []
    for begin in range(0, prompt, chunk):
        tokens = min(chunk, prompt - begin)
        end = begin + tokens
        samples, admitted = int(end == prompt), int(begin == 0)
        if tokens == 1:
            steps.append(StepShape(1, samples, decode_context=end, admitted=admitted))
        else:
            pairs = tokens * end - tokens * (tokens - 1) // 2
            steps.append(StepShape(tokens, samples, 0, end, pairs, admitted))
    return steps


@dataclass(frozen=True, slots=True)
class GpuTimeModel:
    """The model on ``footprint.ranks`` GPUs."""

    gpu: Gpu
    footprint: Footprint

    def seconds(self, step: StepShape) -> float:
        """Of one step."""
        foot = self.footprint
        bandwidth = self.gpu.read_gb_per_s * 1e9 * hardware.READ_SHARE * foot.ranks
        peak = self.gpu.bf16_tflops * 1e12 * foot.ranks
        matmul, attention = peak * hardware.MATMUL_SHARE, peak * hardware.ATTENTION_SHARE
        layers = max(foot.layer_bytes / bandwidth, 2 * foot.layer_weights * step.tokens / matmul)
        head = max(foot.head_bytes / bandwidth, 2 * foot.head_weights * step.samples / matmul)
        cached = foot.kv_bytes_per_token / bandwidth
        extends = max(
            cached * step.extend_context, foot.attention_flops * step.extend_pairs / attention
        )
        return (
            layers
            + (head if step.samples else 0.0)
            + cached * step.decode_context
            + extends
            + self._gaps()
            + self._all_reduces(step.tokens)
        )

    def _gaps(self) -> float:
        kernels = hardware.KERNELS_PER_LAYER * self.footprint.layers + hardware.OTHER_KERNELS
        return kernels * hardware.KERNEL_GAP_US * 1e-6

    def _all_reduces(self, tokens: float) -> float:
        """Two a layer over the hidden states, in a ring; and one of next to nothing for the head's
        winners."""
        foot, ranks = self.footprint, self.footprint.ranks
        if ranks == 1:
            return 0.0
        passed = 2 * (ranks - 1) / ranks * tokens * foot.hidden_bytes
        link = self.gpu.link_gb_per_s * 1e9 * hardware.LINK_SHARE
        return 2 * foot.layers * (passed / link + self.gpu.link_us * 1e-6) + self.gpu.link_us * 1e-6


# Drafted and kept tokens a row and step, by the longest draft, from cautious to bold: the engine's
# drafter along every eighth trace of QwQ-32B in misguided_qwq32b.json (118,845 tokens), guesses
# with a chance of at least 0.6, 0.4, 0.3, 0.2, 0.1 (``bench.speculation.Own``).
MEASURED: dict[int, tuple[tuple[float, float], ...]] = {
    1: ((0.260, 1.195), (0.506, 1.321), (0.560, 1.340), (0.665, 1.366), (0.686, 1.371)),
    2: ((0.310, 1.227), (0.668, 1.403), (0.812, 1.452), (1.062, 1.510), (1.236, 1.538)),
    4: ((0.331, 1.240), (0.747, 1.439), (0.960, 1.505), (1.341, 1.588), (1.843, 1.654)),
    8: ((0.338, 1.243), (0.776, 1.449), (1.018, 1.521), (1.458, 1.613), (2.158, 1.696)),
}


def draft_choices(most: int, acceptance: float | None) -> tuple[tuple[float, float], ...]:
    """Pairs of drafted and kept tokens for drafts of up to ``most``. None: as on the traces; else
    every guess is right with that chance if those before it were."""
    if acceptance is None:
        return MEASURED[max(length for length in MEASURED if length <= most)]
    kept = 1.0
    found = []
    for drafted in range(1, most + 1):
        kept += acceptance**drafted
        found.append((float(drafted), kept))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class SpeculativeTimeModel:
    """Seconds of a step that gives each decoding row one token, its share of a step with drafts."""

    plain: StepTimeModel
    choices: Sequence[tuple[float, float]]

    def seconds(self, step: StepShape) -> float:
        """Of one step."""
        alone = self.plain.seconds(step)
        if step.extends or step.samples != step.tokens:
            return alone
        return min([alone, *(self._drafting(step, *choice) for choice in self.choices)])

    def _drafting(self, step: StepShape, drafted: float, kept: float) -> float:
        """Cached tokens are read once for all that is drafted behind them."""
        rows = step.tokens * (1 + drafted)
        return self.plain.seconds(replace(step, tokens=rows, samples=rows)) / kept
