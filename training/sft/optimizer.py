"""AdamW, s1's learning rate over time, and clipping, over sharded parameters."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from s1engine.training.sft.sft_config import SftConfig


def make_optimizer(model: nn.Module, config: SftConfig) -> torch.optim.AdamW:
    """Weight decay on matrices only, as transformers' Trainer has it."""
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


def learning_rate(config: SftConfig, step: int, steps: int) -> float:
    """Of optimizer step ``step`` of ``steps``, from 0: rises linearly over the warm-up, then falls
    along half a cosine to 0."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def clip_gradients(model: nn.Module, norm: float) -> float:
    """Scales all gradients down to ``norm`` together; returns their norm before that."""
    found = torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
    return float(found.full_tensor() if isinstance(found, DTensor) else found)
