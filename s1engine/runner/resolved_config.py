"""What depends on the device that is there: the device itself, dtypes, default sizes.

``ResolvedConfig`` is an EngineConfig in which nothing of this is left open; everything below the
engine takes it. What depends on the model too (``resolve_dtype``) is resolved where the model is.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from s1engine.config import Device, EngineConfig
from s1engine.errors import RequestError
from s1engine.ops.kv_quant import EIGHT_BIT_DTYPES

BLOCK_SIZES = {"cpu": 16, "cuda": 64}  # tokens; a GPU's attention reads a block as one tile
RUN_AHEAD = {"cpu": 1, "cuda": 8}  # steps
MAX_RUN_S = 0.008  # of decode steps in flight while a reader, a deadline or a request waits
MAX_STEP_MS = {"cpu": 40.0, "cuda": 0.0}  # a GPU computes max_num_batched_tokens in less

ResolvedDevice = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedConfig(EngineConfig):
    """An EngineConfig for one device."""

    device: ResolvedDevice
    block_size: int
    run_ahead: int
    max_step_ms: float


def resolve_config(config: EngineConfig) -> ResolvedConfig:
    """Fills in what the device decides. Raises RequestError if the device is not there."""
    device = resolve_device(config.device)
    _check_workers(config, device)
    return resolve_for(config, device)


def resolve_for(config: EngineConfig, device: ResolvedDevice) -> ResolvedConfig:
    """The same for a device that need not be there."""
    options: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(config)}
    single = config.enforce_eager or config.num_speculative_tokens
    options["device"] = device
    options["block_size"] = config.block_size or BLOCK_SIZES[device]
    options["run_ahead"] = config.run_ahead or (1 if single else RUN_AHEAD[device])
    if config.max_step_ms is None:
        options["max_step_ms"] = MAX_STEP_MS[device]
    return ResolvedConfig(**options)


def resolve_device(device: Device) -> ResolvedDevice:
    """``auto`` becomes the device that is there."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise RequestError("device cuda: no CUDA device is available", param="device")
    return ("cuda" if available else "cpu") if device == "auto" else device


def _check_workers(config: EngineConfig, device: str) -> None:
    ranks, gpus = config.tensor_parallel_size, torch.cuda.device_count()
    if ranks == 1:
        return
    if device == "cuda" and ranks > gpus:
        raise RequestError(
            f"tensor_parallel_size {ranks}: there are {gpus} GPUs, and each rank needs its own; "
            f"use at most {gpus}",
            param="tensor_parallel_size",
        )
    if config.num_speculative_tokens:
        raise RequestError(
            f"num_speculative_tokens {config.num_speculative_tokens} with tensor_parallel_size "
            f"{ranks} is not supported; leave one of them out",
            param="num_speculative_tokens",
        )


def rank_threads(config: EngineConfig) -> int | None:
    """Threads of the CPU kernels in each rank's process; None: torch's number."""
    if config.num_threads is None:
        return None
    return max(config.num_threads // config.tensor_parallel_size, 1)


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
