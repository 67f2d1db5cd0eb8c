"""The table of cosines and sines of rotary position embedding.

Owns the frequency formulas of the supported kinds (default, linear, llama3, yarn, longrope), in
float32 as transformers computes them. Knows nothing of attention; the rotation itself is an
operation.
"""

import math
from typing import Any

import torch
from torch import Tensor

from s1engine.models.rope import Rope


def cos_sin_table(head_dim: int, rope: Rope | None, length: int) -> Tensor:
    """float32 [length, head_dim]: cosines of head_dim/2 angles, then their sines. Pairs that are
    not rotated have an angle of 0; without ``rope`` these are all.

    Longrope has one set of frequencies for short contexts and one for long ones, and a KV cache can
    hold keys of one set only: ``length``, the bound of all contexts, decides.
    """
    half = head_dim // 2
    table = torch.cat((torch.ones(length, half), torch.zeros(length, half)), dim=-1)
    if rope is None:
        return table
    frequencies = _frequencies(rope.rotary_dim(head_dim), rope.theta, rope.scaling, length)
    angles = torch.arange(length, dtype=torch.float32).unsqueeze(1) * frequencies
    growth: float = (rope.scaling or {}).get("attention_factor", 1.0)
    pairs = frequencies.shape[0]
    table[:, :pairs] = angles.cos().mul_(growth)
    table[:, half : half + pairs] = angles.sin().mul_(growth)
    return table


def _frequencies(dim: int, theta: float, scaling: dict[str, Any] | None, length: int) -> Tensor:
    """Radians per position of the dim/2 rotated pairs, [dim / 2].

    Most kinds of scaling blend each pair between its plain speed and that divided by the factor.
    """
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling is None:
        return plain
    match scaling["rope_type"]:
        case "linear":
            kept = torch.zeros_like(plain)
        case "llama3":
            kept = _llama3_kept(plain, scaling)
        case "longrope":
            is_long = length > scaling["original_max_position_embeddings"]
            return plain / torch.tensor(scaling["long_factor" if is_long else "short_factor"])
        case kind:
            assert kind == "yarn"
            kept = _yarn_kept(theta, dim, scaling)
    return (1 - kept) * (plain / float(scaling["factor"])) + kept * plain


def _llama3_kept(plain: Tensor, scaling: dict[str, Any]) -> Tensor:
    """[head_dim / 2]: 1 for pairs that turn often within the original context, 0 for slow ones."""
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = plain * (float(scaling["original_max_position_embeddings"]) / (2 * math.pi))
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_kept(theta: float, head_dim: int, scaling: dict[str, Any]) -> Tensor:
    """Like llama3's, but linear in the pair's index between two numbers of turns."""

    def pair_of(turns: float) -> float:
        """Index, as a real number, of the pair with so many turns in the original context."""
        length = scaling["original_max_position_embeddings"]
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(scaling["beta_fast"]), pair_of(scaling["beta_slow"])
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    return 1 - ((pairs - first) / (last - first)).clamp(0, 1)
