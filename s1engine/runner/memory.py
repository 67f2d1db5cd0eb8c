"""How much memory the KV blocks get, and which option to lower where it does not suffice."""

import ctypes
import logging
import os
from typing import NamedTuple

import torch

from s1engine.errors import RequestError
from s1engine.models.model_facts import ModelFacts
from s1engine.models.weight_bytes import weight_bytes
from s1engine.runner.resolved_config import ResolvedConfig

logger = logging.getLogger(__name__)

GIB = 2**30
MAX_DEFAULT_CPU_CACHE = 4 * GIB


class KVCapacity(NamedTuple):
    """What the KV cache of a rank holds."""

    max_model_len: int  # longest sequence, tokens
    num_blocks: int


def plan_memory(
    config: ResolvedConfig, model: ModelFacts, cache_dtype: torch.dtype, activation_bytes: int = 0
) -> KVCapacity:
    """What fits into memory that already holds the weights.

    Args:
        model: this rank's part.
        cache_dtype: of the KV cache.
        activation_bytes: kept free for the largest step.
    """
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
    if fits < _blocks_of_longest(config, model, max_len):
        if config.max_model_len is not None:
            raise RequestError(
                f"max_model_len {max_len} does not fit: memory holds {fits * config.block_size} "
                "tokens; lower it or raise kv_cache_memory_gb",
                param="max_model_len",
            )
        max_len = fits * config.block_size
        logger.warning("max_model_len lowered to %d, what the KV cache holds", max_len)
    useful = config.max_num_seqs * -(-max_len // config.block_size)
    return KVCapacity(max_len, min(fits, useful))


def _blocks_of_longest(config: ResolvedConfig, model: ModelFacts, max_len: int) -> int:
    """Blocks that the longest sequence holds at a time (csrc/core/sliding_window.hpp)."""
    blocks = -(-max_len // config.block_size)
    if model.max_window == 0:
        return blocks
    interval = model.max_window - 1 + config.max_num_batched_tokens
    return min(blocks, (interval + config.block_size - 2) // config.block_size + 1)


def check_weights_fit(
    model: ModelFacts, dtype: torch.dtype, device: str, quantization: str | None
) -> None:
    """Raises RequestError, with the bytes needed and free, before anything is loaded."""
    needed = weight_bytes(model, dtype, quantization).total
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else _available_memory()
    if needed > free:
        name = torch.cuda.get_device_name() if device == "cuda" else "this machine"
        raise RequestError(
            f"the weights take {needed / GIB:.1f} GiB in "
            f"{quantization or str(dtype).removeprefix('torch.')}, "
            f"{free / GIB:.1f} GiB are free on {name}",
            param="model",
        )


def _available_memory() -> int:
    """Bytes of main memory available without swapping, caches included."""
    try:
        with open("/proc/meminfo") as file:
            entries = dict(line.split(":") for line in file)
        return int(entries["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def return_free_memory() -> None:
    """Gives memory that the C library keeps for later allocations back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)


def _no_memory(
    config: ResolvedConfig, available: float, activation_bytes: int, block_bytes: int
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


def _cache_bytes(config: ResolvedConfig) -> float:
    if config.kv_cache_memory_gb is not None:
        return config.kv_cache_memory_gb * GIB
    if config.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return free - (1 - config.gpu_memory_utilization) * total
    return min(_available_memory() / 4, MAX_DEFAULT_CPU_CACHE) / config.tensor_parallel_size
