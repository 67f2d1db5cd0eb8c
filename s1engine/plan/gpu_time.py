"""Time of a step on one GPU, or on several that share every layer: from bytes and operations.

    step     = linears + head + attention + gaps between kernels + all-reduces
    linears  = max(weights / bandwidth, 2 * weights * tokens / peak), the head likewise over samples
    attention: keys and values of decoding rows / bandwidth, and of extending rows the same or
               4 * heads * head_dim * pairs / peak, whichever is longer

with the shares of ``hardware``. Quantized weights are widened before the product, so they save
bytes, not operations.
"""

from dataclasses import dataclass

from s1engine.plan import hardware
from s1engine.plan.footprint import Footprint
from s1engine.plan.hardware import Gpu
from s1engine.plan.step import Step


@dataclass(frozen=True, slots=True)
class GpuTime:
    """The model on ``footprint.ranks`` GPUs."""

    gpu: Gpu
    footprint: Footprint

    def seconds(self, step: Step) -> float:
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
