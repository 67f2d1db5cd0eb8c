"""A model's facts from config.json and generation_config.json, checked and frozen.

Owns the list of supported models, and the names and shapes of their tensors. Reads no weights and
runs no code of the model directory: ``auto_map`` is ignored, other architectures are refused.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from s1engine import gguf_file
from s1engine.checks import shown
from s1engine.models.config_reader import ConfigReader
from s1engine.models.families import (
    FAMILIES,
    NORM_NAMES,
    Family,
    Norms,
    find_family,
    parse_activation,
    refuse_unknown,
)
from s1engine.models.fp8_layout import FP8, Fp8Layout, parse_fp8
from s1engine.models.generation_config import (
    end_token_ids,
    read_generation_config,
    sampling_defaults,
)
from s1engine.models.gguf_config import read_gguf_config
from s1engine.models.layer_patterns import (
    parse_layers_without_rope,
    parse_query_growth,
    parse_ropes,
    parse_windows,
)
from s1engine.models.model_facts import ModelFacts
from s1engine.models.rope import Rope, extended_positions

if TYPE_CHECKING:
    from s1engine.ops import Activation

MAX_POSITIONS = 2**24
EMBED, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"

_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(ModelFacts):
    """A model that our decoder computes: grouped-query attention, rotary positions, gated MLP."""

    hidden_size: int
    intermediate_size: int
    rms_norm_eps: float
    norms: Norms = "before"
    """RMS norms of attention's and MLP's input, of their output, or of both."""
    norm_offset: float = 0.0
    """Added to the weights of all norms when they are loaded."""
    rope: Rope
    local_rope: Rope | None = None
    """Of layers with a window; None: ``rope`` as well."""
    layers_without_rope: frozenset[int] = frozenset()
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    """RMS norm of the queries and keys before the rotation: of each head,"""
    wide_qk_norm: bool = False
    """or of all heads at once."""
    attention_scale: float | None = None
    """Factor of q k; None: 1 / sqrt(head_dim)."""
    query_growth: tuple[float, int] | None = None
    """(beta, length): a query at position p is multiplied by 1 + beta ln(1 + floor(p / length))."""
    attention_sinks: bool = False
    """A logit for each head that joins the softmax and has no value."""
    activation: "Activation" = "silu"
    """Of the MLP's gate."""
    embed_scale: float = 1.0
    """Factor of the embeddings, in the model's dtype."""
    tie_word_embeddings: bool
    fused_projections: bool = False
    """The checkpoint holds q, k and v as one tensor, gate and up as another."""
    in_wrapper: bool = False
    """The checkpoint is a multimodal model's, of which this is the text part."""
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
        config, architecture, in_wrapper = find_family(config)
        family = FAMILIES[architecture]
        _refuse_unsupported(config)
        max_positions = config.integer("max_position_embeddings", high=MAX_POSITIONS)
        num_layers = config.integer("num_hidden_layers", high=1000)
        num_heads, num_kv_heads, head_dim = _heads(config)
        rope, local_rope = parse_ropes(config, family, max_positions, head_dim)
        longest = extended_positions(rope, max_positions)
        without_rope = parse_layers_without_rope(config, family, num_layers)
        qkv_bias, o_bias = _attention_biases(config, family)
        hidden_size = config.integer("hidden_size")
        model = cls(
            architecture=architecture,
            vocab_size=config.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=config.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=config.positive("rms_norm_eps", 1e-6),
            norms=family.norms,
            norm_offset=family.norm_offset,
            rope=rope,
            local_rope=local_rope,
            layers_without_rope=without_rope,
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            qk_norm=family.qk_norm,
            wide_qk_norm=family.wide_qk_norm,
            attention_scale=_attention_scale(config, family),
            query_growth=parse_query_growth(config, family),
            activation=parse_activation(config, family),
            embed_scale=hidden_size**0.5 if family.scaled_embeddings else 1.0,
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            fused_projections=family.fused_projections,
            in_wrapper=in_wrapper,
            max_position_embeddings=longest,
            eos_token_ids=end_token_ids(config, generation),
            dtype_name=stored_dtype(config),
            generation_defaults=sampling_defaults(generation, config.integer("vocab_size")),
            layer_windows=parse_windows(config, family, num_layers, longest, without_rope),
            fp8=parse_fp8(config),
        )
        refuse_unknown(config)
        return model

    def quantization(self, requested: str | None) -> str | None:
        """Format of the matrices in memory: the requested one, else the checkpoint's own."""
        return requested or (None if self.fp8 is None else FP8)

    @property
    def num_parameters(self) -> int:
        """Weights, tied ones counted once."""
        return sum(prod(shape) for shape in self.tensor_shapes().values())

    def layer_rope(self, layer: int) -> Rope | None:
        """The rotary embedding of a layer; None: it has none."""
        if layer in self.layers_without_rope:
            return None
        is_local = self.layer_windows[layer] > 0
        return self.local_rope if is_local and self.local_rope is not None else self.rope

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of this model by its Hugging Face name. Some checkpoints call them otherwise
        or fuse some (tensor_names.py)."""
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
            norm: (hidden,) for norm in NORM_NAMES[self.norms].values()
        }
        shapes |= {
            "self_attn.q_proj.weight": (q_rows, hidden),
            "self_attn.k_proj.weight": (kv_rows, hidden),
            "self_attn.v_proj.weight": (kv_rows, hidden),
            "self_attn.o_proj.weight": (hidden, q_rows),
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
        if self.qk_norm or self.wide_qk_norm:
            wide = self.wide_qk_norm
            shapes["self_attn.q_norm.weight"] = (q_rows if wide else self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (kv_rows if wide else self.head_dim,)
        if self.attention_sinks:
            shapes["self_attn.sinks"] = (self.num_heads,)
        return shapes


def _refuse_unsupported(config: ConfigReader) -> None:
    if config.flag("mlp_bias", False):
        raise config.error("mlp_bias", "is set: biases in the MLP are not supported")
    for key, causal in (("is_causal", True), ("use_bidirectional_attention", False)):
        if config.flag(key, causal) != causal:
            raise config.error(key, f"is {not causal}: only causal attention is supported")


def _attention_biases(config: ConfigReader, family: Family) -> tuple[bool, bool]:
    """Whether the projections to q, k and v have a bias, and the one after attention."""
    qkv, o = family.qkv_bias, family.o_bias
    return (
        config.flag("attention_bias", False) if qkv is None else qkv,
        config.flag(o, False) if isinstance(o, str) else o,
    )


def _attention_scale(config: ConfigReader, family: Family) -> float | None:
    if "query_pre_attn_scalar" not in family.defaults:
        return None
    return float(config.positive("query_pre_attn_scalar") ** -0.5)


def _heads(config: ConfigReader) -> tuple[int, int, int]:
    """Query heads, KV heads and their size."""
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.error(
            "num_key_value_heads", f"({num_kv_heads}) must divide the {num_heads} attention heads"
        )
    hidden_size = config.integer("hidden_size")
    if "head_dim" not in config and hidden_size % num_heads:
        raise config.error(
            "num_attention_heads", f"({num_heads}) must divide hidden_size ({hidden_size})"
        )
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise config.error("head_dim", f"({head_dim}) must be even")
    return num_heads, num_kv_heads, head_dim


def stored_dtype(config: ConfigReader) -> str:
    """The checkpoint's dtype; float32 if config.json does not say."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if name not in _DTYPES:
        raise config.error(
            "torch_dtype", f"{shown(name)} is not supported; use {', '.join(_DTYPES)}"
        )
    return name


def _read(file: Path) -> tuple[ConfigReader, ConfigReader]:
    """Contents of config.json and of generation_config.json."""
    if file.suffix == gguf_file.SUFFIX:
        return read_gguf_config(file)
    return ConfigReader.read(file), read_generation_config(file.parent)
