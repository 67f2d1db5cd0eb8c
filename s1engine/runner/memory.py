"""How much memory goes to KV blocks, and what to lower where it does not suffice."""

import logging
import os

import torch

from s1engine.config import EngineConfig
from s1engine.errors import RequestError
from s1engine.models.config import ModelConfig

logger = logging.getLogger(__name__)

GIB = 2**30
MAX_DEFAULT_CPU_CACHE = 4 * GIB


def plan_memory(
    config: EngineConfig, model: ModelConfig, cache_dtype: torch.dtype, activation_bytes: int = 0
) -> tuple[int, int]:
    """Longest sequence in tokens, and number of KV blocks; after the weights are in memory.

    Args:
        config: resolved for the device.
        cache_dtype: of the KV cache.
        activation_bytes: what the largest step takes besides, kept free.
    """
    assert config.block_size is not None
    block_bytes = config.block_size * model.kv_bytes_per_token(cache_dtype)
    max_len = config.max_model_len or model.max_position_embeddings
    if max_len > model.max_position_embeddings:
        raise RequestError(
            f"max_model_len {max_len} exceeds the {model.max_position_embeddings} positions "
            "of the model",
            param="max_model_len",
        )
    available = _cache_bytes(config) - activation_bytes
    fits = int(available // block_bytes)
    if fits < 1:
        raise RequestError(_no_memory(config, available, activation_bytes, block_bytes),
                           param="kv_cache_memory_gb")  # fmt: skip
    if fits * config.block_size < max_len:
        if config.max_model_len is not None:
            raise RequestError(
                f"max_model_len {max_len} does not fit: memory holds {fits * config.block_size} "
                "tokens; lower it or raise kv_cache_memory_gb",
                param="max_model_len",
            )
        max_len = fits * config.block_size
        logger.warning("max_model_len lowered to %d, what the KV cache holds", max_len)
    useful = config.max_num_seqs * -(-max_len // config.block_size)
    return max_len, min(fits, useful)


def _no_memory(
    config: EngineConfig, available: float, activation_bytes: int, block_bytes: int
) -> str:
    if config.device != "cuda":
        return "no memory for a single KV block"
    return (
        f"no memory for a single KV block of {block_bytes / GIB:.3f} GiB: beside the weights, "
        f"{(available + activation_bytes) / GIB:.2f} GiB may be used and the largest step takes "
        f"{activation_bytes / GIB:.2f} GiB; lower max_num_batched_tokens (now "
        f"{config.max_num_batched_tokens}) or max_num_seqs (now {config.max_num_seqs}), or raise "
        f"gpu_memory_utilization (now {config.gpu_memory_utilization:g})"
    )


def _cache_bytes(config: EngineConfig) -> float:
    if config.kv_cache_memory_gb is not None:
        return config.kv_cache_memory_gb * GIB
    if config.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return free - (1 - config.gpu_memory_utilization) * total
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(available / 4, MAX_DEFAULT_CPU_CACHE)
