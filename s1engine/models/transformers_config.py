"""Facts of a model that transformers computes, and what is refused before its weights are read.

Covered is a causal language model whose layers all attend by transformers' attention interface.
Runs no code of the model directory. The shapes of the KV cache are what config.json says;
transformers_loader.py measures them at the module.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s1engine.checks import shown
from s1engine.models import model_config
from s1engine.models.config_reader import ConfigReader
from s1engine.models.generation_config import (
    end_token_ids,
    read_generation_config,
    sampling_defaults,
)
from s1engine.models.model_facts import ModelFacts

LAYER_TYPES = ("full_attention", "sliding_attention")
MAX_REASON_CHARS = 1024
DEQUANTIZED = "mxfp4"  # the one quantized format that is read: its weights are expanded
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # in transformers, by the longest of a batch


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformersConfig(ModelFacts):
    """A causal language model of transformers that our paged attention serves."""

    path: Path
    """The model directory."""
    num_parameters: int
    """Weights, tied ones counted once."""
    dequantize: bool
    """The experts are stored in DEQUANTIZED, and are expanded to the chosen dtype."""

    @classmethod
    def from_dir(cls, path: Path) -> "TransformersConfig":
        """The model of a Hugging Face directory, or a ModelError naming file and field."""
        with unchanged_environment():
            return cls._from_dir(path)

    @classmethod
    def _from_dir(cls, path: Path) -> "TransformersConfig":
        file = path / "config.json"
        raw = ConfigReader.read(file)
        config = _load(path, raw)
        model_class = _model_class(raw, config)
        sizes = config.get_text_config(decoder=True)
        text = ConfigReader(file, sizes.to_dict())
        _refuse_unsupported(text, config, model_class)
        generation = read_generation_config(path)
        num_heads = text.integer("num_attention_heads", sizes.num_attention_heads)
        num_layers = text.integer("num_hidden_layers", sizes.num_hidden_layers)
        hidden_size = text.integer("hidden_size", sizes.hidden_size)
        return cls(
            architecture=model_class.__name__,
            vocab_size=text.integer("vocab_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=text.integer("num_key_value_heads", num_heads),
            head_dim=text.integer("head_dim", hidden_size // num_heads),
            max_position_embeddings=text.integer(
                "max_position_embeddings",
                getattr(sizes, "max_position_embeddings", None),
                high=model_config.MAX_POSITIONS,
            ),
            eos_token_ids=end_token_ids(text, generation),
            dtype_name=model_config.stored_dtype(raw),
            generation_defaults=sampling_defaults(generation, text.integer("vocab_size")),
            layer_windows=(0,) * num_layers,
            path=path,
            dequantize=_quantization_method(config) == DEQUANTIZED,
            num_parameters=_count_parameters(model_class, config),
        )


@contextmanager
def unchanged_environment() -> Iterator[None]:
    """Removes what torch's compiler, which transformers imports, writes into the environment of
    this process, such as TORCHINDUCTOR_CACHE_DIR."""
    before = set(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - before:
            if name.startswith(("TORCH", "TRITON")):
                del os.environ[name]


def _load(path: Path, raw: ConfigReader) -> Any:
    """transformers' configuration object."""
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    model_type = raw.get("model_type")
    _refuse_kernels(raw, dict.fromkeys(raw))
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        hint = "; code of the model directory (auto_map) is never run" if "auto_map" in raw else ""
        raise raw.error(
            "model_type", f"{shown(model_type)} is unknown to transformers {__version__}{hint}"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers passes on any error of its parsers
        reason = str(error)[:MAX_REASON_CHARS].strip().partition("\n")[0]
        raise raw.error("", f"is refused by transformers: {reason}") from error


def _refuse_kernels(raw: ConfigReader, fields: Mapping[str, Any]) -> None:
    """Raises ModelError for a field, at any depth, by which transformers fetches and runs code of
    another repository: an implementation of attention or experts that is named owner/name."""
    for name in fields:
        value = raw.get(name)
        if isinstance(value, dict):
            _refuse_kernels(raw.section(name), value)
        elif name.endswith("_implementation") and "/" in str(value):
            raise raw.error(name, f"({shown(value)}) names code of the hub, which is never run")


def _model_class(raw: ConfigReader, config: Any) -> Any:
    """The class that ``architectures`` names, if it is a causal language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    names = raw.get("architectures")
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    for model_class in classes if isinstance(classes, tuple | list) else (classes,):
        if names == [model_class.__name__]:
            return model_class
    raise raw.error("architectures", f"{shown(names)} is no causal language model of transformers")


def _refuse_unsupported(text: ConfigReader, config: Any, model_class: Any) -> None:
    """Raises ModelError for what the classes and the config say already."""
    if config.is_encoder_decoder:
        raise text.error("is_encoder_decoder", "is true: cross attention is not supported")
    method = _quantization_method(config)
    if method not in (None, DEQUANTIZED):
        raise text.error("quantization_config", f"{method!r} is not supported through transformers")
    types = text.get("layer_types") or []
    for layer_type in types:
        if layer_type not in LAYER_TYPES:
            raise text.error(
                "layer_types", f"{layer_type!r} keeps no plain KV cache: not supported"
            )
    name = model_class.__name__
    if getattr(model_class, "_is_stateful", False):
        raise text.error("architectures", f"{name} keeps state outside attention: not supported")
    if not model_class.is_backend_compatible():
        raise text.error(
            "architectures", f"{name} does not attend by transformers' attention interface"
        )
    if text.get("attn_logit_softcapping"):
        raise text.error("attn_logit_softcapping", "is set: paged attention has no softcap")
    for rope_type in _rope_types(text.get("rope_parameters") or {}):
        if rope_type in LENGTH_DEPENDENT_ROPE:
            raise text.error(
                "rope_parameters",
                f"rope_type {rope_type!r}: transformers scales it by the longest of a batch",
            )


def _quantization_method(config: Any) -> str | None:
    """The format of a quantized checkpoint; None: it is not quantized."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return str(quantization.get("quant_method"))


def _rope_types(parameters: dict[str, Any]) -> Iterator[Any]:
    """Of all layers: the parameters may be nested by layer type."""
    yield parameters.get("rope_type")
    yield from (part.get("rope_type") for part in parameters.values() if isinstance(part, dict))


def _count_parameters(model_class: Any, config: Any) -> int:
    import torch

    with torch.device("meta"):
        module = model_class(config)
    return sum(parameter.numel() for parameter in module.parameters())
