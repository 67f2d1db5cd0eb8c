"""Rotary position embedding: its parameters in config.json, and the table of cosines and sines.

Owns the frequency formulas of the supported kinds (default, linear, llama3, yarn), in float32 as
transformers computes them. Knows nothing of attention; the rotation itself is an operation.
"""

import math
from typing import Any

import torch
from torch import Tensor

from s1engine.models.config_reader import ConfigReader

DEFAULT_THETA = 10000.0

_KNOWN_KEYS = frozenset(
    {
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"),
        *("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        *("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    }
)


def parse_rope(config: ConfigReader, max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """Theta, and the scaling with its checked parameters (None: default) of a config.json.

    Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before).
    """
    is_old_style = bool(config.get("rope_scaling"))
    rope = config.section("rope_scaling" if is_old_style else "rope_parameters")
    theta = rope.number("rope_theta", config.number("rope_theta", DEFAULT_THETA, low=2), low=2)
    for key in rope:
        if key not in _KNOWN_KEYS:
            raise rope.error(key, "is not a known parameter of rotary embeddings")
    for section in (config, rope):
        if section.number("partial_rotary_factor", 1.0) != 1.0:
            raise section.error("partial_rotary_factor", "other than 1 is not supported")
    kind = rope.get("rope_type") or rope.get("type") or (None if is_old_style else "default")
    match kind:
        case "default":
            return theta, None
        case "linear":
            return theta, {"rope_type": kind, "factor": rope.number("factor", low=1.0)}
        case "llama3":
            return theta, _parse_llama3(rope, max_positions)
        case "yarn":
            return theta, _parse_yarn(rope, max_positions)
    raise rope.error(
        "rope_type", f"{kind!r} is not supported; supported: default, linear, llama3, yarn"
    )


def _parse_llama3(rope: ConfigReader, max_positions: int) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": rope.number("factor", low=1.0),
        "low_freq_factor": rope.positive("low_freq_factor"),
        "high_freq_factor": rope.positive("high_freq_factor"),
        "original_max_position_embeddings": _original_positions(rope, max_positions),
    }
    if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise rope.error("high_freq_factor", "must be above low_freq_factor")
    return scaling


def _parse_yarn(rope: ConfigReader, max_positions: int) -> dict[str, Any]:
    factor = rope.number("factor", low=1.0)
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "beta_fast": rope.positive("beta_fast", 32.0),
        "beta_slow": rope.positive("beta_slow", 1.0),
        "truncate": rope.flag("truncate", True),
        "original_max_position_embeddings": _original_positions(rope, max_positions),
    }
    if scaling["beta_fast"] < scaling["beta_slow"]:
        raise rope.error("beta_fast", "must not be below beta_slow")
    mscale, all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    attention = _yarn_growth(factor, 1.0)
    if mscale and all_dim:
        attention = _yarn_growth(factor, mscale) / _yarn_growth(factor, all_dim)
    scaling["attention_factor"] = rope.number("attention_factor", attention)
    return scaling


def _original_positions(rope: ConfigReader, max_positions: int) -> int:
    return rope.integer("original_max_position_embeddings", max_positions)


def _yarn_growth(factor: float, mscale: float) -> float:
    """Scale of cosines and sines: longer contexts need a sharper softmax."""
    return 0.1 * mscale * math.log(factor) + 1.0


def extended_positions(scaling: dict[str, Any] | None, max_positions: int) -> int:
    """Longest context of a model. With yarn, max_position_embeddings may still be the original
    length (Qwen2.5 documents it so), and the factor extends it."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return max_positions
    original: int = scaling["original_max_position_embeddings"]
    return max(max_positions, int(original * scaling["factor"]))


def cos_sin_table(
    head_dim: int, theta: float, scaling: dict[str, Any] | None, length: int
) -> Tensor:
    """float32 [length, head_dim]: cosines of head_dim/2 angles, then their sines."""
    frequencies = _frequencies(head_dim, theta, scaling)
    angles = torch.arange(length, dtype=torch.float32).unsqueeze(1) * frequencies
    growth: float = (scaling or {}).get("attention_factor", 1.0)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(growth)


def _frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> Tensor:
    """Radians per position of the head_dim/2 pairs, [head_dim / 2].

    All kinds of scaling blend each pair between its plain speed and that divided by the factor.
    """
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return plain
    match scaling["rope_type"]:
        case "linear":
            kept = torch.zeros_like(plain)
        case "llama3":
            kept = _llama3_kept(plain, scaling)
        case kind:
            assert kind == "yarn"
            kept = _yarn_kept(theta, head_dim, scaling)
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
