"""A model's facts from config.json and generation_config.json, checked and frozen.

Owns the list of supported models, and the names and shapes of their tensors. Reads no weights and
runs no code of the model directory: ``auto_map`` is ignored, other architectures are refused.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from s1engine import gguf_file
from s1engine.models.config_reader import ConfigReader
from s1engine.models.fp8_layout import Fp8Layout, parse_fp8
from s1engine.models.generation_config import (
    end_token_ids,
    read_generation_config,
    sampling_defaults,
)
from s1engine.models.gguf_config import read_gguf_config
from s1engine.models.interface import ModelFacts
from s1engine.models.rope import extended_positions, parse_rope
from s1engine.ops.quantization import FP8

MAX_POSITIONS = 2**24
EMBED, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class _Family:
    """How an architecture differs from the others."""

    qkv_bias: bool | None  # None: config.json's attention_bias decides, for o_proj as well
    qk_norm: bool = False
    head_dim: int | None = None  # if config.json has none; None: hidden_size / heads
    has_window_switch: bool = False  # use_sliding_window switches the window on
    default_window: int | None = None  # if config.json does not mention sliding_window


FAMILIES = {
    "Qwen2ForCausalLM": _Family(qkv_bias=True, has_window_switch=True),
    "Qwen3ForCausalLM": _Family(qkv_bias=None, qk_norm=True, head_dim=128, has_window_switch=True),
    "LlamaForCausalLM": _Family(qkv_bias=None),
    "MistralForCausalLM": _Family(qkv_bias=False, default_window=4096),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(ModelFacts):
    """A model that our decoder computes: grouped-query attention, rotary positions, gated MLP."""

    hidden_size: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    """Checked parameters under ``rope_type``; None is plain rotary embedding."""
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    """RMS norm of each query and key head before the rotation."""
    tie_word_embeddings: bool
    fp8: Fp8Layout | None = None
    """Layout of the matrices stored in fp8; None: there are none."""

    @classmethod
    def from_dir(cls, path: str | Path) -> "ModelConfig":
        """The model of a Hugging Face directory or a GGUF file, or a ModelError naming file and
        field."""
        path = Path(path)
        return cls.from_file(path if path.suffix == gguf_file.SUFFIX else path / "config.json")

    @classmethod
    def from_file(cls, file: Path) -> "ModelConfig":
        """The model of a config.json, which may have any name and no weights beside it, or of a
        GGUF file."""
        config, generation = _read(file)
        architecture = _architecture(config)
        family = FAMILIES[architecture]
        _refuse_unsupported(config)
        _refuse_sliding_window(config, family)
        max_positions = config.integer("max_position_embeddings", high=MAX_POSITIONS)
        rope_theta, rope_scaling = parse_rope(config, max_positions)
        num_heads, num_kv_heads, head_dim = _heads(config, family)
        attention_bias = config.flag("attention_bias", False)
        return cls(
            architecture=architecture,
            vocab_size=config.integer("vocab_size"),
            hidden_size=config.integer("hidden_size"),
            intermediate_size=config.integer("intermediate_size"),
            num_layers=config.integer("num_hidden_layers", high=1000),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=config.positive("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias and family.qkv_bias is None,
            qk_norm=family.qk_norm,
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            max_position_embeddings=extended_positions(rope_scaling, max_positions),
            eos_token_ids=end_token_ids(config, generation),
            torch_dtype=stored_dtype(config),
            generation_defaults=sampling_defaults(generation, config.integer("vocab_size")),
            layer_windows=(0,) * config.integer("num_hidden_layers", high=1000),
            fp8=parse_fp8(config),
        )

    def quantization(self, requested: str | None) -> str | None:
        """Format of the matrices in memory: the requested one, else the checkpoint's own."""
        return requested or (None if self.fp8 is None else FP8)

    @property
    def num_parameters(self) -> int:
        """Weights, tied ones counted once."""
        return sum(prod(shape) for shape in self.tensor_shapes().values())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of this model's checkpoint by its Hugging Face name."""
        shapes: dict[str, tuple[int, ...]] = {
            EMBED: (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes[LM_HEAD] = (self.vocab_size, self.hidden_size)
        layer = self._layer_shapes()
        for index in range(self.num_layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        q_rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q_rows, hidden),
            "self_attn.k_proj.weight": (kv_rows, hidden),
            "self_attn.v_proj.weight": (kv_rows, hidden),
            "self_attn.o_proj.weight": (hidden, q_rows),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        if self.qkv_bias:
            shapes["self_attn.q_proj.bias"] = (q_rows,)
            shapes["self_attn.k_proj.bias"] = (kv_rows,)
            shapes["self_attn.v_proj.bias"] = (kv_rows,)
        if self.o_bias:
            shapes["self_attn.o_proj.bias"] = (hidden,)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = (self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        return shapes


def _architecture(config: ConfigReader) -> str:
    names = config.get("architectures")
    if isinstance(names, list):
        for family in FAMILIES:
            if names == [family]:
                return family
    raise config.error(
        "architectures", f"{names!r} is not supported; supported: {', '.join(FAMILIES)}"
    )


def _refuse_unsupported(config: ConfigReader) -> None:
    activation = config.get("hidden_act") or "silu"
    if activation != "silu":
        raise config.error("hidden_act", f"{activation!r} is not supported; only silu is")
    if config.flag("mlp_bias", False):
        raise config.error("mlp_bias", "is set: biases in the MLP are not supported")
    if not config.flag("is_causal", True) or config.flag("use_bidirectional_attention", False):
        raise config.error("is_causal", "is false: only causal attention is supported")


def _refuse_sliding_window(config: ConfigReader, family: _Family) -> None:
    if family.has_window_switch and config.flag("use_sliding_window", False):
        raise config.error("use_sliding_window", "is set: sliding windows are not supported")
    if family.default_window is not None:
        is_null = "sliding_window" in list(config) and "sliding_window" not in config
        positions = config.integer("max_position_embeddings")
        if not is_null and config.integer("sliding_window", family.default_window) < positions:
            raise config.error(
                "sliding_window", "is below max_position_embeddings: windows are not supported"
            )
    layer_types = config.get("layer_types") or ["full_attention"]
    if not isinstance(layer_types, list) or set(map(str, layer_types)) != {"full_attention"}:
        raise config.error("layer_types", "has other layers than full_attention: not supported")


def _heads(config: ConfigReader, family: _Family) -> tuple[int, int, int]:
    """Query heads, KV heads and their size."""
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.error(
            "num_key_value_heads", f"({num_kv_heads}) must divide the {num_heads} attention heads"
        )
    hidden_size = config.integer("hidden_size")
    if "head_dim" not in config and family.head_dim is None and hidden_size % num_heads:
        raise config.error(
            "num_attention_heads", f"({num_heads}) must divide hidden_size ({hidden_size})"
        )
    head_dim = config.integer("head_dim", family.head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise config.error("head_dim", f"({head_dim}) must be even")
    return num_heads, num_kv_heads, head_dim


def stored_dtype(config: ConfigReader) -> torch.dtype:
    """The checkpoint's dtype; float32 if config.json does not say."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if name not in _DTYPES:
        raise config.error("torch_dtype", f"{name!r} is not supported; use {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _read(file: Path) -> tuple[ConfigReader, ConfigReader]:
    """Contents of config.json and of generation_config.json."""
    if file.suffix == gguf_file.SUFFIX:
        return read_gguf_config(file)
    return ConfigReader.read(file), read_generation_config(file.parent)
