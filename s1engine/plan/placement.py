"""Whether a model fits, and how much of its memory is left for sequences.

The rule is the engine's own (``runner.memory``), with memory from the data sheet in place of what
a device says is free.
"""

from dataclasses import dataclass, replace
from math import prod

import torch

from s1engine.config import EngineConfig
from s1engine.errors import RequestError
from s1engine.models.model_config import ModelConfig
from s1engine.ops.kv_quant import check_covered
from s1engine.ops.quantization import FORMATS, FP8, HEAD_FORMATS, bytes_per_weight
from s1engine.plan.hardware import GPUS, WEIGHTS, Gpu
from s1engine.runner.memory import GIB, plan_memory
from s1engine.runner.resolved_config import BLOCK_SIZES, RUN_AHEAD, resolve_cache_dtype

HEADS = {fmt: head or "auto" for fmt, head in HEAD_FORMATS.items()}
"""A head's format, where it is not the layers'."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """A model in bytes, over all its ranks where nothing else is said."""

    layers: int
    ranks: int
    """GPUs that share every layer: heads, inner size and vocabulary are split among them."""
    layer_weights: int
    """Elements of the matrices that every token passes."""
    layer_bytes: float
    """Of these matrices."""
    head_weights: int
    head_bytes: float
    rest_bytes: float
    """Norms and biases, and an embedding that is not the head: every rank has all of it."""
    hidden_bytes: int
    """Of the hidden states of one token."""
    cache_dtype: torch.dtype
    kv_bytes_per_token: int
    attention_flops: int
    """For one pair of a query and a key, over all heads and layers."""
    activation_bytes: float
    """On one rank in the largest step, logits included."""

    @property
    def weight_bytes(self) -> float:
        """Over all ranks."""
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
    """Raises RequestError if the ranks cannot share the heads."""
    check_ranks(model, ranks)
    size, cache_dtype = dtype.itemsize, resolve_cache_dtype(kv_cache_dtype, dtype)
    shapes = model.tensor_shapes()
    matrices = [s for n, s in shapes.items() if ".layers." in n and len(s) == 2]
    layer_weights = sum(map(prod, matrices))
    embedding = model.vocab_size * model.hidden_size
    untied = 0 if model.tie_word_embeddings else embedding
    vectors = model.num_parameters - layer_weights - embedding - untied
    widest = 2 * model.intermediate_size // ranks + 4 * model.hidden_size
    return Footprint(
        layers=model.num_layers,
        ranks=ranks,
        layer_weights=layer_weights,
        layer_bytes=sum(prod(s) * _bytes(weights, s[1], size) for s in matrices),
        head_weights=embedding,
        head_bytes=embedding * _bytes(HEADS.get(weights, weights), model.hidden_size, size),
        rest_bytes=(vectors + untied) * size,
        hidden_bytes=model.hidden_size * size,
        cache_dtype=cache_dtype,
        kv_bytes_per_token=model.kv_bytes_per_token(cache_dtype),
        attention_flops=4 * model.num_layers * model.num_heads * model.head_dim,
        activation_bytes=max_num_batched_tokens * widest * size
        + 3 * 4 * max_samples * model.vocab_size,  # logits in float32, and two copies
    )


def _bytes(weights: str, columns: int, size: int) -> float:
    """Of one weight, its share of the scales included."""
    return bytes_per_weight(weights, columns) if weights in (*FORMATS, FP8) else size


def divisors(model: ModelConfig) -> list[int]:
    """Numbers of ranks that can share the model, up to 8."""
    return [n for n in range(1, 9) if model.num_kv_heads % n == 0 and model.num_heads % n == 0]


def check_ranks(model: ModelConfig, ranks: int) -> None:
    if ranks not in divisors(model):
        fits = ", ".join(map(str, divisors(model)))
        raise RequestError(
            f"tensor_parallel_size {ranks} does not divide {model.num_heads} query heads and "
            f"{model.num_kv_heads} KV heads, or is above 8; there are {fits}",
            param="tensor_parallel_size",
        )


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


def place_on_gpus(
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
    return placement_of(resolved, model, foot)


def placement_of(config: EngineConfig, model: ModelConfig, foot: Footprint) -> Placement:
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
