"""One step on the device: forward pass, logits of the rows that sample, sampling.

Owns the weights, the KV cache, the batch buffers and the sampling state. Knows nothing of requests:
it computes what the ScheduledBatch says and returns one token a sampling row.
"""

import logging
import os
from pathlib import Path
from typing import Protocol

import torch

from s1engine.config import EngineConfig
from s1engine.errors import RequestError
from s1engine.models.config import ModelConfig
from s1engine.models.loader import load_decoder
from s1engine.ops import select_ops
from s1engine.runner.input_batch import InputBatch
from s1engine.runner.kv_cache import KVCache
from s1engine.runner.sampler import Sampler, SamplerOutput

logger = logging.getLogger(__name__)

GIB = 2**30
MAX_DEFAULT_CPU_CACHE = 4 * GIB


class Runner(Protocol):
    """What an engine needs of a runner: memory for sequences, and steps."""

    batch: InputBatch
    sampler: Sampler
    max_model_len: int
    num_blocks: int

    def execute(self) -> SamplerOutput:
        """Computes the step that stands in ``batch``."""


class ModelRunner:
    """A loaded model with memory for its sequences.

    Args:
        model_config: the architecture, from the model directory.
        path: that directory.
        vocab_limit: number of token ids that may be sampled.
        triggers: ids that end thinking, banned where the scheduler says so.
        progress: show a bar while weights load.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        path: Path,
        *,
        vocab_limit: int,
        triggers: tuple[int, ...],
        progress: bool,
    ) -> None:
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device, model_config.torch_dtype)
        self.ops = select_ops(self.device)
        self.ops.check_model(
            head_dim=model_config.head_dim,
            num_heads=model_config.num_heads,
            num_kv_heads=model_config.num_kv_heads,
            block_size=config.block_size,
            dtype=self.dtype,
        )
        self._vocab_limit = vocab_limit
        self._decoder = load_decoder(
            path, model_config, self.dtype, self.device, self.ops, progress=progress
        )
        self.max_model_len, self.num_blocks = plan_memory(
            config, model_config, self.device, self.dtype
        )
        self.kv_cache = KVCache(
            model_config,
            num_blocks=self.num_blocks,
            block_size=config.block_size,
            dtype=self.dtype,
            device=self.device,
        )
        self.batch = InputBatch(
            max_tokens=config.max_num_batched_tokens,
            max_rows=config.max_num_seqs,
            max_blocks=-(-self.max_model_len // config.block_size),
            device=self.device,
        )
        self.sampler = Sampler(
            max_num_seqs=config.max_num_seqs,
            vocab_size=vocab_limit,
            triggers=triggers,
            ops=self.ops,
            device=self.device,
        )

    @torch.inference_mode()
    def execute(self) -> SamplerOutput:
        """Computes the step that stands in ``batch``."""
        inputs = self.batch.inputs()
        hidden = self._decoder.forward(inputs.input_ids, self.kv_cache.layers, inputs.attention)
        logits = self._decoder.logits(hidden[inputs.sample_tokens], self._vocab_limit)
        return self.sampler.sample(logits, inputs.rows, self.batch.core.num_banned > 0)


def resolve_device(device: str) -> str:
    """``auto`` becomes the device that is there."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise RequestError("device cuda: no CUDA device is available", param="device")
    return ("cuda" if available else "cpu") if device == "auto" else device


def resolve_dtype(dtype: str, device: str, native: torch.dtype) -> torch.dtype:
    """``auto`` becomes the checkpoint's type, or float32 on a CPU without bf16 instructions."""
    if dtype != "auto":
        resolved = getattr(torch, dtype)
        assert isinstance(resolved, torch.dtype)
        return resolved
    if device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return native


def plan_memory(
    config: EngineConfig, model: ModelConfig, device: str, dtype: torch.dtype
) -> tuple[int, int]:
    """Longest sequence in tokens, and number of KV blocks; after the weights are in memory."""
    block_bytes = config.block_size * model.kv_bytes_per_token(dtype)
    max_len = config.max_model_len or model.max_position_embeddings
    if max_len > model.max_position_embeddings:
        raise RequestError(
            f"max_model_len {max_len} exceeds the {model.max_position_embeddings} positions "
            "of the model",
            param="max_model_len",
        )
    fits = int(_cache_bytes(config, device) // block_bytes)
    if fits < 1:
        raise RequestError("no memory for a single KV block", param="kv_cache_memory_gb")
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


def _cache_bytes(config: EngineConfig, device: str) -> float:
    if config.kv_cache_memory_gb is not None:
        return config.kv_cache_memory_gb * GIB
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return free - (1 - config.gpu_memory_utilization) * total
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(available / 4, MAX_DEFAULT_CPU_CACHE)
