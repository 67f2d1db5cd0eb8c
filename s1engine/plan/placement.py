"""The memory of a model on the GPUs of one engine, and the KV cache that fits beside it.

Applies the engine's own rule (``runner.memory``) to the memory on the data sheet. Reads shapes
only, no weights. Knows no time.
"""

from dataclasses import dataclass, replace
from math import prod

import torch

from s1engine.config import EngineConfig
from s1engine.errors import RequestError
from s1engine.models.model_config import ModelConfig
from s1engine.models.shard import Shard, tensor_parallel_sizes
from s1engine.models.weight_bytes import weight_bytes
from s1engine.ops.kv_quant import check_covered
from s1engine.plan.hardware import GPUS, WEIGHTS, Gpu
from s1engine.runner.memory import GIB, plan_memory
from s1engine.runner.resolved_config import (
    MAX_RUN_S,
    ResolvedConfig,
    resolve_cache_dtype,
    resolve_for,
)

MAX_RANKS = 8  # GPUs of one machine


@dataclass(frozen=True, slots=True)
class Footprint:
    """Sizes of a model; totals over all ranks unless noted."""

    layers: int
    ranks: int
    """GPUs of the engine; each holds a shard of every layer and of the vocabulary."""
    layer_weights: int
    """Elements of the layers' matrices."""
    layer_bytes: float
    """Bytes of these matrices."""
    head_weights: int
    head_bytes: float
    rest_bytes: float
    """Of one rank, and the same on all: norms and biases, and an embedding that is not the head."""
    hidden_bytes: int
    """Hidden states of one token."""
    cache_dtype: torch.dtype
    kv_bytes_per_token: int
    attention_flops: int
    """Operations for one pair of a query and a key, over all heads and layers."""
    activation_bytes: float
    """Of one rank in the largest step, logits included."""

    @property
    def weight_bytes(self) -> float:
        return self.layer_bytes + self.head_bytes + self.ranks * self.rest_bytes

    @property
    def weight_bytes_per_rank(self) -> float:
        return self.weight_bytes / self.ranks


def footprint(
    model: ModelConfig,
    dtype: torch.dtype,
    *,
    weights: str = "auto",
    kv_cache_dtype: str = "auto",
    ranks: int = 1,
    max_samples: int = 256,
    max_num_batched_tokens: int = 2048,
) -> Footprint:
    """The footprint of a model in these formats. Raises RequestError if ranks cannot share it."""
    if ranks > MAX_RANKS:
        raise RequestError(
            f"tensor_parallel_size {ranks}: a plan has at most {MAX_RANKS} GPUs in an engine",
            param="tensor_parallel_size",
        )
    size, cache_dtype = dtype.itemsize, resolve_cache_dtype(kv_cache_dtype, dtype)
    quantization = None if weights == "auto" else weights
    whole = weight_bytes(model, dtype, quantization)
    rank_model = Shard(0, ranks).config(model)
    per_rank = weight_bytes(rank_model, dtype, quantization)
    layer_weights = sum(
        prod(shape)
        for name, shape in rank_model.tensor_shapes().items()
        if ".layers." in name and len(shape) == 2
    )
    widest = 2 * model.intermediate_size // ranks + 4 * model.hidden_size
    return Footprint(
        layers=model.num_layers,
        ranks=ranks,
        layer_weights=ranks * layer_weights,
        layer_bytes=ranks * per_rank.layers,
        head_weights=model.vocab_size * model.hidden_size,
        head_bytes=ranks * per_rank.head,
        rest_bytes=whole.vectors + whole.embedding,
        hidden_bytes=model.hidden_size * size,
        cache_dtype=cache_dtype,
        kv_bytes_per_token=ranks * rank_model.kv_bytes_per_token(cache_dtype),
        attention_flops=4 * model.num_layers * model.num_heads * model.head_dim,
        activation_bytes=max_num_batched_tokens * widest * size
        + 3 * 4 * max_samples * model.vocab_size,  # logits in float32, and two copies
    )


def rank_counts(model: ModelConfig) -> list[int]:
    """Numbers of GPUs of one machine that can share the model."""
    return tensor_parallel_sizes(model, MAX_RANKS)


@dataclass(frozen=True, slots=True)
class Placement:
    """One engine: its model's footprint, and the bounds of its scheduler."""

    footprint: Footprint
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    run_ahead: int
    max_run_s: float  # of a multi-step decode while a request waits

    @property
    def kv_cache_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def largest_batch(self, tokens: float) -> int:
        """Number of sequences of ``tokens`` tokens that can run at once."""
        blocks = max(-(-tokens // self.block_size), 1)
        return int(min(self.num_blocks // blocks, self.max_num_seqs))


def place_on_gpus(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    gpu: Gpu,
    *,
    weights: str,
) -> Placement:
    """Places the model on the GPUs of one engine. Raises RequestError that names what would fit."""
    check_covered(resolve_cache_dtype(config.kv_cache_dtype, dtype), dtype, "fp8", "GPUs")
    ranks = config.tensor_parallel_size
    foot = _footprint(config, model, dtype, weights, ranks)
    free = _free_bytes(config, foot, gpu)
    resolved = resolve_for(config, "cuda")
    if free < resolved.block_size * foot.kv_bytes_per_token:
        raise RequestError(_what_fits(config, model, dtype, gpu, weights, ranks), param="gpu")
    if config.kv_cache_memory_gb is None:
        resolved = replace(resolved, kv_cache_memory_gb=free / ranks / GIB)
    return placement_of(resolved, model, foot)


def placement_of(config: ResolvedConfig, model: ModelConfig, foot: Footprint) -> Placement:
    """The placement for a resolved config, by the engine's rule for the KV cache of one rank."""
    rank_model = Shard(0, foot.ranks).config(model)
    max_len, blocks = plan_memory(config, rank_model, foot.cache_dtype)
    return Placement(
        footprint=foot,
        num_blocks=blocks,
        block_size=config.block_size,
        max_model_len=max_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        run_ahead=config.run_ahead,
        max_run_s=MAX_RUN_S,
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
    """Memory that is left for the KV cache, over all ranks."""
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
    """The error message: what is too large, and what would fit."""

    def fits(gpu: Gpu, weights: str, ranks: int) -> bool:
        foot = _footprint(config, model, dtype, weights, ranks)
        return _free_bytes(config, foot, gpu) >= GIB  # a useful cache

    options = []
    more = [n for n in rank_counts(model) if n > ranks and fits(gpu, weights, n)]
    if more:
        options.append(f"{more[0]} GPUs (--tensor-parallel-size {more[0]})")
    if weights == "auto":
        smaller = [name for name in WEIGHTS if fits(gpu, name, ranks)]
        options += [f"--weights {name}" for name in smaller]
    larger = [g.name for g in GPUS.values() if fits(g, weights, ranks)]
    if larger:
        options.append(f"on {ranks} GPU{'s' * (ranks > 1)}: {', '.join(larger)}")
    foot = _footprint(config, model, dtype, weights, ranks)
    return (
        f"gpu: {foot.weight_bytes_per_rank / 1e9:.1f} GB of weights and "
        f"{foot.activation_bytes / 1e9:.1f} GB of a step leave no memory for a KV cache on the "
        f"{gpu.memory_gb:g} GB of {gpu.name}; what would fit: "
        f"{'; '.join(options) or 'nothing in the table'}"
    )
