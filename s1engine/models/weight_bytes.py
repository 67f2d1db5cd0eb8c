"""How many bytes a model's weights take in memory. Reads no weights: shapes are enough."""

from dataclasses import dataclass
from math import prod

import torch

from s1engine.models.model_config import EMBED, LM_HEAD, ModelConfig
from s1engine.models.model_facts import ModelFacts
from s1engine.models.transformers_config import TransformersConfig
from s1engine.ops.quantization import HEAD_FORMATS, bytes_per_weight


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes of a model, or of one rank's part of it, scales included."""

    layers: int
    """Matrices of all layers."""
    head: int
    """Output head; the input embedding too if they are tied."""
    embedding: int
    """Input embedding that is not the head; a step reads a few of its rows."""
    vectors: int
    """Norms and biases."""

    @property
    def total(self) -> int:
        return self.layers + self.head + self.embedding + self.vectors


def weight_bytes(model: ModelFacts, dtype: torch.dtype, quantization: str | None) -> WeightBytes:
    """The weights with matrices in ``quantization`` (None: in ``dtype``) and the rest in
    ``dtype``. What transformers computes counts as layers."""
    if isinstance(model, TransformersConfig):
        return WeightBytes(
            layers=model.num_parameters * dtype.itemsize, head=0, embedding=0, vectors=0
        )
    assert isinstance(model, ModelConfig)
    head_format = HEAD_FORMATS.get(quantization or "", quantization)
    head = EMBED if model.tie_word_embeddings else LM_HEAD
    sizes = {"layers": 0, "head": 0, "embedding": 0, "vectors": 0}
    for name, shape in model.tensor_shapes().items():
        if len(shape) == 1:
            part, fmt = "vectors", None
        elif name == head:
            part, fmt = "head", head_format
        elif name == EMBED:
            part, fmt = "embedding", None  # looked up, not multiplied
        else:
            part, fmt = "layers", quantization
        each = dtype.itemsize if fmt is None else bytes_per_weight(fmt, shape[1])
        sizes[part] += int(prod(shape) * each)
    return WeightBytes(**sizes)
