"""Floating-point operations of training, and the peak of a device."""

import time
from collections.abc import Iterable
from typing import Any

import torch

from s1engine.plan.hardware import GPUS

PEAK_TFLOPS = {name: float(gpu.bf16_tflops) for name, gpu in GPUS.items()}
"""Dense bfloat16 tensor-core peak of the SXM parts, from NVIDIA's data sheets."""


def matrix_parameters(config: Any) -> int:
    """Weights that every token is multiplied with: layers and head, not the embedding table.

    Args:
        config: a transformers config of a Llama-like decoder (Qwen2, Qwen3, Llama, Mistral).
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    head = head_dim(config)
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    attention = hidden * (2 * queries + 2 * keys)
    layer = attention + 3 * hidden * inner
    return int(config.num_hidden_layers * layer + config.vocab_size * hidden)


def head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def training_flops(config: Any, lengths: Iterable[float]) -> float:
    """Operations of forward and backward over samples of these lengths; recomputation is not
    counted (the definition behind MFU).

    6 per weight and token (PaLM, arXiv 2204.02311, appendix B); causal attention does half of
    12 * heads * head_dim * n^2 per layer.
    """
    matrices = matrix_parameters(config)
    width = config.num_hidden_layers * config.num_attention_heads * head_dim(config)
    return float(sum(6.0 * matrices * n + 6.0 * width * n * n for n in lengths))


def peak_flops(device: torch.device) -> float:
    """Operations per second that MFU is a share of: the data sheet's for a known GPU, otherwise
    measured with a matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, tera in PEAK_TFLOPS.items():
            if known in name:
                return tera * 1e12
    size = 4096 if device.type == "cuda" else 768
    a = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best
