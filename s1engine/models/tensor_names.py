"""What a checkpoint calls the tensors of a model.

``ModelConfig.tensor_shapes`` names each tensor once, as most checkpoints do. Some hold several as
one, row below row, or as the text part of a multimodal model. Opens no files.
"""

from collections.abc import Container
from dataclasses import dataclass

from s1engine.models.model_config import LM_HEAD, ModelConfig

_FUSED = {
    "self_attn.qkv_proj.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    "mlp.gate_up_proj.weight": ("gate_proj.weight", "up_proj.weight"),
}
_WRAPPERS = (
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    {"model.": "model.language_model."},
)
"""Prefixes of the text part: before transformers 5, and since."""

_OTHER_PARTS = tuple(
    prefix + part
    for prefix in ("", "model.")
    for part in ("vision_tower.", "vision_model.", "multi_modal_projector.", "patch_merger.")
)


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows ``first`` on of a tensor of the checkpoint, as many as the model's tensor has."""

    name: str
    first: int = 0


def tensor_sources(config: ModelConfig, checkpoint: Container[str]) -> dict[str, StoredRows]:
    """Where each tensor of a whole model is in ``checkpoint``, a set of names."""
    prefixes = _wrapper_prefixes(checkpoint) if config.in_wrapper else {}
    sources = {name: StoredRows(name) for name in config.tensor_shapes()}
    if config.fused_projections:
        for layer in range(config.num_layers):
            sources |= _fused(config, f"model.layers.{layer}.")
    return {
        name: StoredRows(_with_prefix(source.name, prefixes), source.first)
        for name, source in sources.items()
    }


def stored_shapes(
    config: ModelConfig, sources: dict[str, StoredRows]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the checkpoint's tensors: as many rows as the model's tensors in them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, *columns) in config.tensor_shapes().items():
        stored = sources[name].name
        before = shapes[stored][0] if stored in shapes else 0
        shapes[stored] = (before + rows, *columns)
    return shapes


def head_names(config: ModelConfig) -> tuple[str, ...]:
    """Names that the output head may have in a checkpoint."""
    wrappers = _WRAPPERS if config.in_wrapper else ({},)
    return tuple({_with_prefix(LM_HEAD, prefixes) for prefixes in wrappers})


def is_other_part(config: ModelConfig, name: str) -> bool:
    """Is this a tensor of the parts of a multimodal model that see?"""
    return config.in_wrapper and name.startswith(_OTHER_PARTS)


def _fused(config: ModelConfig, layer: str) -> dict[str, StoredRows]:
    shapes = config.tensor_shapes()
    sources = {}
    for fused, parts in _FUSED.items():
        module, first = fused.partition(".")[0], 0
        for part in parts:
            name = f"{layer}{module}.{part}"
            sources[name] = StoredRows(layer + fused, first)
            first += shapes[name][0]
    return sources


def _wrapper_prefixes(checkpoint: Container[str]) -> dict[str, str]:
    for prefixes in _WRAPPERS:
        if _with_prefix("model.norm.weight", prefixes) in checkpoint:
            return prefixes
    return _WRAPPERS[-1]


def _with_prefix(name: str, prefixes: dict[str, str]) -> str:
    for plain, prefix in prefixes.items():
        if name.startswith(plain):
            return prefix + name.removeprefix(plain)
    return name
