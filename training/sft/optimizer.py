"""AdamW, s1's learning rate schedule, and gradient clipping, over sharded parameters."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from s1engine.training.sft.sft_config import SftConfig


def create_optimizer(model: nn.Module, config: SftConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, as in transformers' Trainer."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    # fused: no temporary copy of the parameters in the step
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=betas, fused=True
    )


def learning_rate(config: SftConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step ``step``, from 0: a linear warm-up, then half a cosine down
    to 0."""
    warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    done = (step - warmup) / max(num_steps - warmup, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scales all gradients so that their common norm is at most ``max_norm``; returns the norm
    before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
