"""The shape of a step, and models of the seconds it takes on GPUs, without and with drafts.

A shape is read from a simulated batch and from a measured one alike. Time on GPUs, with the shares
of peak that ``hardware`` assumes:

    step      = layers + head + attention + gaps between kernels + all-reduces
    layers    = max(weights / bandwidth, 2 * weights * tokens / peak); head: the same over samples
    attention = KV bytes of decoding rows / bandwidth, and for extending rows the larger of that and
                4 * heads * head_dim * pairs / peak

Quantized weights are dequantized before the product: they save bytes, not operations.
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
    """Sizes of one step. A row with one pending token decodes, a row with more extends."""

    tokens: float
    samples: float
    """Rows that sample."""
    decode_context: float = 0
    """Sum over decoding rows of the cached tokens they read."""
    extend_context: float = 0
    """Sum over extending rows of the cached tokens they read."""
    extend_pairs: float = 0
    """Sum over extending rows of the pairs of a query and a key that it sees."""
    admitted: float = 0
    """Sequences whose first step this is."""

    @property
    def extends(self) -> bool:
        return self.extend_context > 0

    @property
    def mixed(self) -> bool:
        return self.extend_context > 0 and self.decode_context > 0

    @classmethod
    def from_batch(cls, batch: InputBatch, admitted: int = 0) -> "StepShape":
        """The step scheduled in ``batch``, which is on the CPU."""
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


def decode_step(rows: float, context: float) -> StepShape:
    """A step of ``rows`` decoding sequences with ``context`` tokens each."""
    return StepShape(rows, rows, rows * context)


class StepTimeModel(Protocol):
    """Predicts the time of a step."""

    def seconds(self, step: StepShape) -> float:
        """Seconds of one step."""


def prefill_steps(prompt: int, chunk: int) -> list[StepShape]:
    """The steps of a prompt that runs alone, ``chunk`` tokens at a time; the last step samples."""
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
    """Time on the ``footprint.ranks`` GPUs of one engine; see the module's docstring."""

    gpu: Gpu
    footprint: Footprint

    def seconds(self, step: StepShape) -> float:
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
        """Two ring all-reduces of the hidden states per layer, and one of a few bytes for the
        best tokens of the head's shards."""
        foot, ranks = self.footprint, self.footprint.ranks
        if ranks == 1:
            return 0.0
        sent = 2 * (ranks - 1) / ranks * tokens * foot.hidden_bytes
        link = self.gpu.link_gb_per_s * 1e9 * hardware.LINK_SHARE
        latency = self.gpu.link_us * 1e-6
        return 2 * foot.layers * (sent / link + latency) + latency


# Draft tokens and accepted tokens per row and step, by the maximum draft length, from cautious to
# bold: the engine's drafter on every eighth trace of QwQ-32B in misguided_qwq32b.json (118,845
# tokens), with acceptance probabilities of at least 0.6, 0.4, 0.3, 0.2, 0.1
# (bench/studies/draft_acceptance.py).
MEASURED_DRAFTS: dict[int, tuple[tuple[float, float], ...]] = {
    1: ((0.260, 1.195), (0.506, 1.321), (0.560, 1.340), (0.665, 1.366), (0.686, 1.371)),
    2: ((0.310, 1.227), (0.668, 1.403), (0.812, 1.452), (1.062, 1.510), (1.236, 1.538)),
    4: ((0.331, 1.240), (0.747, 1.439), (0.960, 1.505), (1.341, 1.588), (1.843, 1.654)),
    8: ((0.338, 1.243), (0.776, 1.449), (1.018, 1.521), (1.458, 1.613), (2.158, 1.696)),
}


def draft_choices(max_len: int, acceptance: float | None) -> tuple[tuple[float, float], ...]:
    """Pairs of draft and emitted tokens per row and step, for drafts of up to ``max_len`` tokens.

    ``acceptance``: probability of a draft token after accepted ones; None: as measured on traces.
    """
    if acceptance is None:
        return MEASURED_DRAFTS[max(n for n in MEASURED_DRAFTS if n <= max_len)]
    emitted = 1.0
    choices = []
    for drafted in range(1, max_len + 1):
        emitted += acceptance**drafted
        choices.append((float(drafted), emitted))
    return tuple(choices)


@dataclass(frozen=True, slots=True)
class SpeculativeTimeModel:
    """Seconds of a step for one token per decoding row, as its share of a step with drafts.

    Like the engine, it drafts only where drafts pay. Steps that compute prompts have no drafts.
    """

    plain: StepTimeModel
    choices: Sequence[tuple[float, float]]

    def seconds(self, step: StepShape) -> float:
        plain = self.plain.seconds(step)
        if step.extends or step.samples != step.tokens:
            return plain
        return min([plain, *(self._with_drafts(step, *choice) for choice in self.choices)])

    def _with_drafts(self, step: StepShape, drafted: float, emitted: float) -> float:
        """All draft tokens of a row share one read of its cached tokens."""
        tokens = step.tokens * (1 + drafted)
        return self.plain.seconds(replace(step, tokens=tokens, samples=tokens)) / emitted
