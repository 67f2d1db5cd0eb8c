"""Cross-entropy of a linear head without the logits of all tokens.

``linear_cross_entropy`` processes chunks of tokens. It keeps the gradients instead of the logits:
[M, H] for the hidden states and [V, H] in float32 for the weight. At 32k tokens and a vocabulary of
152k, a chunk of 1,024 tokens takes 0.6 GB; all logits would take 20 GB. On a GPU with
liger-kernel installed, its fused kernel does the same.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Sum over M tokens of ``-log softmax(hidden @ weight.T)[target]``, float32.

    Args:
        hidden: [M, H], bfloat16 or float32.
        weight: [V, H], same type.
        targets: [M] int64.
        chunk: tokens whose logits exist at once.
    """
    if hidden.is_cuda:
        fused = _liger_function()
        if fused is not None:
            loss: Tensor = fused(hidden, weight, targets, reduction="sum")
            return loss.float()
    function: Any = _ChunkedCrossEntropy  # torch declares apply() without parameters
    total: Tensor = function.apply(hidden, weight, targets, chunk)
    return total


def _liger_function() -> Any:
    """liger-kernel's function; None if it is not installed."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return None
    return liger_fused_linear_cross_entropy


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits exist:
    ``d loss / d logits = softmax(logits) - onehot(target)``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        needs_grad = any(ctx.needs_input_grad)
        d_hidden = torch.empty_like(hidden) if needs_grad else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        for begin in range(0, len(hidden), chunk):
            part = slice(begin, begin + chunk)
            logits = (hidden[part] @ weight.T).float()  # [chunk, V]
            total += functional.cross_entropy(logits, targets[part], reduction="sum")
            if d_hidden is None or d_weight is None:
                continue
            grad = torch.softmax(logits, dim=-1)
            grad[torch.arange(len(grad), device=grad.device), targets[part]] -= 1
            low = grad.to(hidden.dtype)
            d_hidden[part] = low @ weight
            d_weight += low.T @ hidden[part]
        if needs_grad:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = grads[0]
        return (
            (d_hidden * scale).to(d_hidden.dtype),
            (d_weight * scale).to(ctx.weight_dtype),
            None,
            None,
        )
