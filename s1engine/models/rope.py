"""Rotary position embedding: its parameters in config.json, for the tables of rope_table.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from s1engine.checks import shown
from s1engine.models.config_reader import ConfigReader

DEFAULT_THETA = 10000.0
MAX_FACTOR = 1e30

_KNOWN_KEYS = frozenset(
    {
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"),
        *("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        *("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
        *("short_factor", "long_factor"),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary embedding of a layer's queries and keys."""

    theta: float = DEFAULT_THETA
    scaling: dict[str, Any] | None = None
    """Checked parameters under ``rope_type``; None is plain rotary embedding."""
    partial: float = 1.0
    """Share of a head's dimensions that is rotated: the first ones."""

    def rotary_dim(self, head_dim: int) -> int:
        """Dimensions of a head that are rotated."""
        return int(head_dim * self.partial)

    def pair_order(self, head_dim: int) -> list[int]:
        """Order of a head's dimensions in which rotated pairs lie half a head apart. Dimension i of
        a checkpoint's head is paired with i + rotary_dim / 2, and those from rotary_dim on turn by
        an angle of 0."""
        half, rotated = head_dim // 2, self.rotary_dim(head_dim)
        unrotated = half - rotated // 2
        first = [*range(rotated // 2), *range(rotated, rotated + unrotated)]
        second = [*range(rotated // 2, rotated), *range(rotated + unrotated, head_dim)]
        return first + second


def parse_rope(
    config: ConfigReader, max_positions: int, *, further_keys: frozenset[str] = frozenset()
) -> Rope:
    """The rotary embedding that a config.json describes.

    Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before).
    ``further_keys``: parameters that the caller reads.
    """
    config.get("rope_parameters")  # known, also where rope_scaling goes before it
    is_old_style = bool(config.get("rope_scaling"))
    rope = config.section("rope_scaling" if is_old_style else "rope_parameters")
    theta = config.number("rope_theta", DEFAULT_THETA, low=2)
    partial = config.number("partial_rotary_factor", 1.0, high=1.0)
    default = None if is_old_style else "default"
    return parse_rope_section(
        rope, Rope(theta=theta, partial=partial), max_positions, default, further_keys
    )


def parse_rope_section(
    rope: ConfigReader,
    outer: Rope,
    max_positions: int,
    default_kind: str | None = "default",
    further_keys: frozenset[str] = frozenset(),
) -> Rope:
    """One section of parameters; what it leaves out is as in ``outer``."""
    for key in rope:
        if key not in _KNOWN_KEYS | further_keys:
            raise rope.error(key, "is not a known parameter of rotary embeddings")
    theta = rope.number("rope_theta", outer.theta, low=2)
    partial = rope.number("partial_rotary_factor", outer.partial, high=1.0)
    kind = rope.get("rope_type") or rope.get("type") or default_kind
    if kind == "default":
        return Rope(theta=theta, partial=partial)
    parse = _PARSERS.get(kind) if isinstance(kind, str) else None
    if parse is None:
        supported = ", ".join(("default", *_PARSERS))
        raise rope.error("rope_type", f"{shown(kind)} is not supported; supported: {supported}")
    return Rope(theta=theta, scaling=parse(rope, max_positions), partial=partial)


def _parse_linear(rope: ConfigReader, max_positions: int) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": rope.number("factor", low=1.0)}


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


def _parse_longrope(rope: ConfigReader, max_positions: int) -> dict[str, Any]:
    original = _original_positions(rope, max_positions)
    factor = rope.number("factor", max_positions / original)
    growth = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "rope_type": "longrope",
        "short_factor": _factors(rope, "short_factor"),
        "long_factor": _factors(rope, "long_factor"),
        "original_max_position_embeddings": original,
        "attention_factor": rope.number("attention_factor", growth),
    }


def _factors(rope: ConfigReader, key: str) -> list[float]:
    """A divisor for each rotated pair."""
    values = rope.get(key)
    if not isinstance(values, list) or not all(
        isinstance(value, int | float) and 0 < value < MAX_FACTOR for value in values
    ):
        raise rope.error(key, f"must be a list of finite numbers above 0; got {shown(values)}")
    return [float(value) for value in values]


_PARSERS: dict[str, Callable[[ConfigReader, int], dict[str, Any]]] = {
    "linear": _parse_linear,
    "llama3": _parse_llama3,
    "yarn": _parse_yarn,
    "longrope": _parse_longrope,
}


def _original_positions(rope: ConfigReader, max_positions: int) -> int:
    return rope.integer("original_max_position_embeddings", max_positions)


def _yarn_growth(factor: float, mscale: float) -> float:
    """Scale of cosines and sines: longer contexts need a sharper softmax."""
    return 0.1 * mscale * math.log(factor) + 1.0


def extended_positions(rope: Rope, max_positions: int) -> int:
    """Longest context of a model. With yarn, max_position_embeddings may still be the original
    length (Qwen2.5 documents it so), and the factor extends it."""
    if rope.scaling is None or rope.scaling["rope_type"] != "yarn":
        return max_positions
    original: int = rope.scaling["original_max_position_embeddings"]
    return max(max_positions, int(original * rope.scaling["factor"]))
