"""The config of a GGUF file: its metadata under the names of Hugging Face's JSON files.

Owns the list of architectures that a GGUF file may have and of the metadata that is understood. A
field of the architecture that nothing here knows may change the results, so it is refused by name.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s1engine.gguf_file import GgufFile, MetadataArray, open_gguf
from s1engine.models.config_reader import ConfigReader

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",  # Mistral's files say llama too
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""config.json's ``architectures`` by ``general.architecture``."""
ROPE_FACTORS = "rope_freqs.weight"

_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_OPTIONAL = ("attention.head_count_kv", "attention.key_length", "rope.freq_base", "vocab_size")
_NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
}
"""Fields that are understood with this value only."""
_HEAD_DIMS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_IGNORED = ("tensor_data_layout", "rope.scaling.finetuned")
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What Llama 3.1 and its successors share; a file holds only the factors that follow from it."""


def read_gguf_config(path: Path) -> tuple[ConfigReader, ConfigReader]:
    """config.json and generation_config.json as they would stand beside the file's weights.

    Raises ModelError naming file and field.
    """
    file = open_gguf(path)
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise file.error(
            "general.architecture", f"{name!r} is not supported; supported: {supported}"
        )
    config = {
        "architectures": [ARCHITECTURES[name]],
        "vocab_size": _vocab_size(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "dtype": _dtype(file),
        **_fields(file, f"{name}."),
        "eos_token_id": _end_tokens(file),
    }
    return ConfigReader(path, config), ConfigReader(path, _generation(file))


def _fields(file: GgufFile, prefix: str) -> dict[str, Any]:
    """The fields of the architecture, which begin with ``prefix``."""
    config: dict[str, Any] = {"sliding_window": None}
    scaling: dict[str, Any] = {}
    for key in file.metadata:
        field = key.removeprefix(prefix)
        if field == key or field in _IGNORED:
            continue
        value = layer_value(file, key)
        if field in _FIELDS:
            config[_FIELDS[field]] = value
        elif field.startswith("rope.scaling."):
            scaling[field.removeprefix("rope.scaling.")] = value
        elif field in _NEUTRAL:
            if value != _NEUTRAL[field]:
                raise file.error(key, f"{value!r} is not supported; only {_NEUTRAL[field]} is")
        elif field not in _HEAD_DIMS:
            raise file.error(key, "is not known: it might change the results")
    for field, name in _FIELDS.items():
        if field not in _OPTIONAL and name not in config:
            raise file.error(prefix + field, "is missing")
    _check_head_dims(file, prefix, config)
    config["rope_scaling"] = _rope_scaling(file, f"{prefix}rope.scaling.", scaling, config)
    return config


def layer_value(file: GgufFile, key: str) -> Any:
    """The value of ``key``, or the one that an array of one value per layer repeats; None if it is
    missing."""
    value = file.metadata.get(key)
    if not isinstance(value, MetadataArray):
        return value
    if value.values is None or len(set(value.values)) != 1:
        raise file.error(key, "differs between layers: that is not supported")
    return value.values[0]


def _check_head_dims(file: GgufFile, prefix: str, config: dict[str, Any]) -> None:
    """Sets head_dim, as ggml infers it; keys, values and the rotation must agree on it."""
    heads, width = f"{prefix}attention.head_count", f"{prefix}embedding_length"
    sizes = ConfigReader(file.path, {key: layer_value(file, key) for key in (heads, width)})
    num_heads, hidden = sizes.integer(heads), sizes.integer(width)
    head_dim = config.setdefault("head_dim", hidden // num_heads)
    if hidden % num_heads and f"{prefix}attention.key_length" not in file.metadata:
        raise file.error(heads, f"({num_heads}) does not divide embedding_length ({hidden})")
    for field in _HEAD_DIMS:
        value = file.metadata.get(prefix + field, head_dim)
        if value != head_dim:
            raise file.error(
                prefix + field, f"{value} differs from the head size of {head_dim}: not supported"
            )


def _rope_scaling(
    file: GgufFile, prefix: str, scaling: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any] | None:
    kind = scaling.get("type", "none")
    factors = _rope_factors(file)
    if factors is not None:
        if kind != "none":
            raise file.error(f"{prefix}type", f"{kind!r} with {ROPE_FACTORS} is not supported")
        return _llama3(file, factors, float(config.get("rope_theta", 10000.0)))
    known = {"none": (), "linear": ("factor",), "yarn": ("factor", "original_context_length")}
    if kind not in known:
        raise file.error(f"{prefix}type", f"{kind!r} is not supported; use {', '.join(known)}")
    for key in scaling:
        if key != "type" and key not in known[kind]:
            raise file.error(prefix + key, f"is not supported with type {kind!r}")
    if kind == "none":
        return None
    rope = {"rope_type": kind, "factor": scaling.get("factor")}
    if "original_context_length" in scaling:
        rope["original_max_position_embeddings"] = scaling["original_context_length"]
    return rope


def _rope_factors(file: GgufFile) -> "Tensor | None":
    if ROPE_FACTORS not in file.tensors:
        return None
    info = file.tensors[ROPE_FACTORS]
    if info.type_name != "F32" or len(info.shape) != 1 or info.shape[0] > 2**12:
        raise file.tensor_error(ROPE_FACTORS, f"is {info.type_name} {list(info.shape)}, not F32 "
                                "with one factor for each pair of a head")  # fmt: skip
    return file.read(ROPE_FACTORS)


def _llama3(file: GgufFile, factors: "Tensor", theta: float) -> dict[str, Any]:
    """Llama 3's scaling, whose factors between neighbours of the two limits the tensor holds."""
    import torch

    pairs = len(factors)
    plain = theta ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    turns = plain * (_LLAMA3["original_max_position_embeddings"] / (2 * math.pi))
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    largest = factors.max().item()
    expected = 1 / ((1 - kept) / largest + kept)
    if not largest >= 1 or not torch.allclose(factors.double(), expected, rtol=1e-3):
        raise file.tensor_error(ROPE_FACTORS, "does not hold Llama 3's factors: other scalings of "
                                "the rotation are not supported")  # fmt: skip
    return {"rope_type": "llama3", "factor": largest, **_LLAMA3}


def _vocab_size(file: GgufFile) -> Any:
    """The number of tokens, unless the architecture has a field of its own."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, MetadataArray):
        raise file.error("tokenizer.ggml.tokens", "is missing: the file holds no tokenizer")
    return tokens.length


def _dtype(file: GgufFile) -> str:
    """The type of the matrices; bfloat16 if any is quantized."""
    matrices = [info.type_name for info in file.tensors.values() if len(info.shape) > 1]
    plain = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    kinds = {plain.get(kind, "bfloat16") for kind in matrices} or {"float32"}
    return kinds.pop() if len(kinds) == 1 else "bfloat16"


def _end_tokens(file: GgufFile) -> list[Any] | None:
    """Ids that end a text or a turn."""
    ids = [file.metadata.get(f"tokenizer.ggml.{key}") for key in _ENDS]
    return [token for token in ids if token is not None] or None


def _generation(file: GgufFile) -> dict[str, Any]:
    """The sampling that the file recommends."""
    values = {
        field: file.metadata[f"general.sampling.{key}"]
        for key, field in _SAMPLING.items()
        if f"general.sampling.{key}" in file.metadata
    }
    return {"do_sample": True, **values} if values else {}
