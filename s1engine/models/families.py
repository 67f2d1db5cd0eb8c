"""The supported architectures, and in what each differs from the others.

Owns their table, and the refusal of fields that are not read although their names say that they
change the computation. Reads no weights.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from s1engine.checks import shown
from s1engine.models.config_reader import ConfigReader

if TYPE_CHECKING:
    from s1engine.ops import Activation

Norms = Literal["before", "after", "both"]
"""Where the RMS norms of attention and MLP are: of their input, of their output, or of both."""

NORM_NAMES: dict[Norms, dict[str, str]] = {
    "before": {
        "input_norm": "input_layernorm.weight",
        "mlp_norm": "post_attention_layernorm.weight",
    },
    "after": {
        "attention_out_norm": "post_attention_layernorm.weight",
        "mlp_out_norm": "post_feedforward_layernorm.weight",
    },
    "both": {
        "input_norm": "input_layernorm.weight",
        "attention_out_norm": "post_attention_layernorm.weight",
        "mlp_norm": "pre_feedforward_layernorm.weight",
        "mlp_out_norm": "post_feedforward_layernorm.weight",
    },
}
"""Fields of LayerWeights, and their tensors in a layer of the checkpoint."""

Windows = Literal["none", "all", "from_layer", "pattern", "without_rope"]
"""Which layers have the window, unless layer_types says so: no layer, all, those from
max_window_layers on, all but every n-th, or those without rotary embedding."""


@dataclass(frozen=True, slots=True)
class Family:
    """How an architecture differs from the others."""

    qkv_bias: bool | None = None  # None: attention_bias decides
    o_bias: bool | str = "attention_bias"  # or the field that decides
    qk_norm: bool = False
    wide_qk_norm: bool = False
    norms: Norms = "before"
    norm_offset: float = 0.0
    activation: str = "hidden_act"  # the field that names it
    scaled_embeddings: bool = False
    windows: Windows = "none"
    window_switch: bool = False  # use_sliding_window switches the window on
    window_pattern: int = 0
    rope_by_layer_type: bool = False  # layers with a window have a rotary embedding of their own
    local_theta: float = 0.0  # theta of these
    fused_projections: bool = False
    partial_rotary: bool = False
    layers_without_rope: bool = False
    query_growth: bool = False  # llama_4_scaling_beta
    defaults: dict[str, Any] = field(default_factory=dict)
    """Values of the fields that config.json does not mention, as in transformers' class."""


_QWEN3 = {"head_dim": 128}
_QWEN_WINDOWS = {"sliding_window": 4096, "max_window_layers": 28}
_OLMO = {"rms_norm_eps": 1e-5}

FAMILIES = {
    "Qwen2ForCausalLM": Family(
        qkv_bias=True,
        o_bias=False,
        windows="from_layer",
        window_switch=True,
        defaults=_QWEN_WINDOWS,
    ),
    "Qwen3ForCausalLM": Family(
        qk_norm=True, windows="from_layer", window_switch=True, defaults=_QWEN_WINDOWS | _QWEN3
    ),
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(
        qkv_bias=False, o_bias=False, windows="all", defaults={"sliding_window": 4096}
    ),
    "Ministral3ForCausalLM": Family(
        qkv_bias=False,
        o_bias=False,
        windows="all",
        query_growth=True,
        defaults={"head_dim": 128, "rms_norm_eps": 1e-5},
    ),
    "Phi3ForCausalLM": Family(
        qkv_bias=False,
        o_bias=False,
        windows="all",
        fused_projections=True,
        partial_rotary=True,
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    ),
    "SeedOssForCausalLM": Family(
        o_bias="attention_out_bias", defaults={"attention_bias": True, "head_dim": 128}
    ),
    "SmolLM3ForCausalLM": Family(
        windows="without_rope",
        window_switch=True,
        layers_without_rope=True,
        defaults={"rope_theta": 2e6, "tie_word_embeddings": True},
    ),
    "Olmo2ForCausalLM": Family(wide_qk_norm=True, norms="after", defaults=_OLMO),
    "Olmo3ForCausalLM": Family(
        wide_qk_norm=True,
        norms="after",
        windows="pattern",
        window_pattern=4,
        rope_by_layer_type=True,
        local_theta=5e5,
        defaults=_OLMO | {"sliding_window": 4096, "rope_theta": 5e5},
    ),
    "Gemma3ForCausalLM": Family(
        qk_norm=True,
        norms="both",
        norm_offset=1.0,
        activation="hidden_activation",
        scaled_embeddings=True,
        windows="pattern",
        window_pattern=6,
        rope_by_layer_type=True,
        local_theta=1e4,
        defaults={
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
    ),
}

_WRAPPERS = {
    "Mistral3ForConditionalGeneration": {
        "mistral": "MistralForCausalLM",
        "ministral3": "Ministral3ForCausalLM",
    },
    "Gemma3ForConditionalGeneration": {"gemma3_text": "Gemma3ForCausalLM"},
}
"""Multimodal models whose text part is a family: text_config.model_type names it."""

_NOT_DENSE = "has layers with a mixture of experts"
_REASONS = {
    "GptOssForCausalLM": _NOT_DENSE,
    "Qwen3MoeForCausalLM": _NOT_DENSE,
    "MixtralForCausalLM": _NOT_DENSE,
    "Gemma4ForCausalLM": "has layers of different head sizes",
    "Gemma4ForConditionalGeneration": "has layers of different head sizes",
}

_ACTIVATIONS: "dict[str, Activation]" = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_CHANGES = frozenset(
    {
        *("act", "activation", "alibi", "attention", "attn", "bias", "cap", "clip", "conv"),
        *("expert", "experts", "gate", "head", "layernorm", "mamba", "mlp", "moe", "multiplier"),
        *("norm", "parallel", "qk", "qkv", "residual", "rms", "rope", "rotary", "router", "scale"),
        *("scaling", "sink", "sinks", "softcap", "softcapping", "ssm", "swiglu", "types", "window"),
    }
)
"""Words in the name of a field that changes the computation."""

_HARMLESS = frozenset(
    {
        *("attention_dropout", "residual_dropout", "attn_implementation"),
        "attention_implementation",
        "max_window_layers",  # without use_sliding_window
        "attention_bias",  # where the architecture decides, the tensors show it
    }
)


def native_architecture(config: ConfigReader) -> str | None:
    """The family of a config.json, or of the text part that it wraps; None: it is no family's."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if isinstance(name, str) and name in _WRAPPERS:
        kind = config.section("text_config").get("model_type")
        return _WRAPPERS[name].get(kind) if isinstance(kind, str) else None
    return name if isinstance(name, str) and name in FAMILIES else None


def find_family(config: ConfigReader) -> tuple[ConfigReader, str, bool]:
    """The fields of the (text) model with its family's defaults, its architecture, and whether it
    is the text part of a multimodal model. Raises ModelError for an unsupported architecture."""
    names, architecture = config.get("architectures"), native_architecture(config)
    if architecture is None:
        name = names[0] if isinstance(names, list) and names else None
        if isinstance(name, str) and name in _WRAPPERS:
            text, kinds = config.section("text_config"), ", ".join(_WRAPPERS[name])
            kind = text.get("model_type")
            raise text.error("model_type", f"{shown(kind)} is not supported; supported: {kinds}")
        supported = ", ".join((*FAMILIES, *_WRAPPERS))
        reason = _REASONS.get(str(name), "is not supported")
        raise config.error("architectures", f"{shown(names)} {reason}; supported: {supported}")
    defaults = FAMILIES[architecture].defaults
    if architecture in names:
        return config.with_defaults(defaults), architecture, False
    inherited = ("dtype", "torch_dtype", "quantization_config", "eos_token_id")
    shared = {key: config.get(key) for key in inherited if key in config}
    tied = {key: config.get(key) for key in ("tie_word_embeddings",) if key in config}
    text = config.section("text_config").with_defaults(defaults | shared, overrides=tied)
    return text, architecture, True


def refuse_unknown(config: ConfigReader) -> None:
    """Raises ModelError for a field that no code has read although it changes the computation.
    Fields that begin with an underscore are notes that transformers makes for itself."""
    for key in config.unread():
        value, words = config.get(key), set(key.lower().split("_"))
        if key.startswith("_"):
            continue
        is_neutral = not value or (value == 1 and value is not True)
        if key not in _HARMLESS and words & _CHANGES and not is_neutral:
            raise config.error(key, f"({shown(value)}) is not known for this architecture")


def parse_activation(config: ConfigReader, family: Family) -> "Activation":
    """The MLP's activation."""
    name = config.get(family.activation) or "silu"
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        supported = ", ".join(_ACTIVATIONS)
        raise config.error(
            family.activation, f"{shown(name)} is not supported; supported: {supported}"
        )
    return _ACTIVATIONS[name]
