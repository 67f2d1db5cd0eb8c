"""What is chosen for the device that is there: the device itself, types, sizes that suit it."""

from dataclasses import replace

import torch

from s1engine.config import EngineConfig
from s1engine.errors import RequestError
from s1engine.ops.kv_quant import EIGHT_BIT_DTYPES

BLOCK_SIZES = {"cpu": 16, "cuda": 64}  # tokens; a GPU's attention reads a block as one tile
RUN_AHEAD = {"cpu": 1, "cuda": 8}  # steps


def resolve_config(config: EngineConfig) -> EngineConfig:
    """The same with what the device decides filled in. Raises RequestError if it is not there."""
    device = resolve_device(config.device)
    _check_ranks(config, device)
    single = config.enforce_eager or config.tensor_parallel_size > 1
    ahead = 1 if single or config.num_speculative_tokens else RUN_AHEAD[device]
    return replace(
        config,
        device=device,
        block_size=config.block_size or BLOCK_SIZES[device],
        run_ahead=config.run_ahead or ahead,
    )


def resolve_device(device: str) -> str:
    """``auto`` becomes the device that is there."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise RequestError("device cuda: no CUDA device is available", param="device")
    return ("cuda" if available else "cpu") if device == "auto" else device


def _check_ranks(config: EngineConfig, device: str) -> None:
    ranks, gpus = config.tensor_parallel_size, torch.cuda.device_count()
    if ranks == 1:
        return
    if device == "cuda" and ranks > gpus:
        raise RequestError(
            f"tensor_parallel_size {ranks}: there are {gpus} GPUs, and each rank needs its own; "
            f"use at most {gpus}",
            param="tensor_parallel_size",
        )
    if (config.run_ahead or 1) > 1:
        raise RequestError(
            f"run_ahead {config.run_ahead} with tensor_parallel_size {ranks} is not supported: the "
            "first rank decides every step; leave run_ahead out",
            param="run_ahead",
        )
    if config.num_speculative_tokens:
        raise RequestError(
            f"num_speculative_tokens {config.num_speculative_tokens} with tensor_parallel_size "
            f"{ranks} is not supported; leave one of them out",
            param="num_speculative_tokens",
        )


def resolve_dtype(dtype: str, device: str, native: torch.dtype) -> torch.dtype:
    """``auto`` becomes the checkpoint's type, or float32 on a CPU without bf16 instructions."""
    if dtype != "auto":
        resolved = getattr(torch, dtype)
        assert isinstance(resolved, torch.dtype)
        return resolved
    if device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return native


def resolve_cache_dtype(kv_cache_dtype: str, dtype: torch.dtype) -> torch.dtype:
    """``auto`` becomes the model's own type."""
    return EIGHT_BIT_DTYPES.get(kv_cache_dtype, dtype)
