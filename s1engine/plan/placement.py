"""Whether a model fits, and how much of its memory is left for sequences.

The rule is the engine's own (``runner.memory``), with memory from the data sheet in place of what
a device says is free.
"""

from dataclasses import dataclass, replace

import torch

from s1engine.config import EngineConfig
from s1engine.errors import RequestError
from s1engine.models.config import ModelConfig
from s1engine.ops.kv_rows import check_covered
from s1engine.plan.footprint import Footprint, divisors, footprint
from s1engine.plan.hardware import GPUS, WEIGHTS, Gpu
from s1engine.runner.device import BLOCK_SIZES, RUN_AHEAD, resolve_cache_dtype
from s1engine.runner.memory import GIB, plan_memory


@dataclass(frozen=True, slots=True)
class Placement:
    """One engine: its model's footprint, and the scheduler's bounds that follow."""

    footprint: Footprint
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    run_ahead: int

    @property
    def kv_cache_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def largest_batch(self, tokens: float) -> int:
        """Sequences of ``tokens`` tokens that run at once."""
        blocks = max(-(-tokens // self.block_size), 1)
        return int(min(self.num_blocks // blocks, self.max_num_seqs))


def on_gpus(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    gpu: Gpu,
    *,
    weights: str,
) -> Placement:
    """The model on the GPUs of one engine. Raises RequestError that says what would fit."""
    check_covered(resolve_cache_dtype(config.kv_cache_dtype, dtype), dtype, "fp8", "GPUs")
    ranks = config.tensor_parallel_size
    foot = _footprint(config, model, dtype, weights, ranks)
    free = _free_bytes(config, foot, gpu)
    needed = (config.block_size or BLOCK_SIZES["cuda"]) * foot.kv_bytes_per_token
    if free < needed:
        raise RequestError(_what_fits(config, model, dtype, gpu, weights, ranks), param="gpu")
    host_decides = ranks > 1 or config.num_speculative_tokens  # each step
    run_ahead = 1 if host_decides else RUN_AHEAD["cuda"]
    resolved = replace(
        config,
        device="cuda",
        block_size=config.block_size or BLOCK_SIZES["cuda"],
        kv_cache_memory_gb=config.kv_cache_memory_gb or free / GIB,
        run_ahead=config.run_ahead or run_ahead,
    )
    return of(resolved, model, foot)


def of(config: EngineConfig, model: ModelConfig, foot: Footprint) -> Placement:
    """By the engine's own rule. ``config`` is resolved; its KV cache holds ``foot``'s tokens."""
    assert config.block_size is not None and config.run_ahead is not None
    max_len, blocks = plan_memory(config, model, foot.cache_dtype)
    return Placement(
        footprint=foot,
        num_blocks=blocks,
        block_size=config.block_size,
        max_model_len=max_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        run_ahead=config.run_ahead,
    )


def _footprint(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, weights: str, ranks: int
) -> Footprint:
    return footprint(
        model,
        dtype,
        weights=weights,
        kv_cache_dtype=config.kv_cache_dtype,
        ranks=ranks,
        max_samples=config.max_samples,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )


def _free_bytes(config: EngineConfig, foot: Footprint, gpu: Gpu) -> float:
    """For keys and values, over all ranks."""
    usable = gpu.memory_gb * 1e9 * config.gpu_memory_utilization
    return foot.ranks * (usable - foot.weight_bytes_per_rank - foot.activation_bytes)


def _what_fits(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    gpu: Gpu,
    weights: str,
    ranks: int,
) -> str:
    """One line: what is too large, and the nearest ways out."""

    def fits(gpu: Gpu, weights: str, ranks: int) -> bool:
        foot = _footprint(config, model, dtype, weights, ranks)
        return _free_bytes(config, foot, gpu) >= GIB  # a cache worth having

    ways = []
    more = [n for n in divisors(model) if n > ranks and fits(gpu, weights, n)]
    if more:
        ways.append(f"{more[0]} GPUs (--tensor-parallel-size {more[0]})")
    if weights == "auto":
        smaller = [name for name in WEIGHTS if fits(gpu, name, ranks)]
        ways += [f"--weights {name}" for name in smaller]
    larger = [g.name for g in GPUS.values() if fits(g, weights, ranks)]
    if larger:
        ways.append(f"on {ranks} GPU{'s' * (ranks > 1)}: {', '.join(larger)}")
    foot = _footprint(config, model, dtype, weights, ranks)
    return (
        f"gpu: a share of {foot.weight_bytes_per_rank / 1e9:.1f} GB of weights and "
        f"{foot.activation_bytes / 1e9:.1f} GB of a step leaves an {gpu.name} of "
        f"{gpu.memory_gb:g} GB no room for a KV cache; what would fit: "
        f"{'; '.join(ways) or 'nothing in the table'}"
    )
