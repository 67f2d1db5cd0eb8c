"""The tensors of a GGUF file under their Hugging Face names: the counterpart of Checkpoint.

Owns the names and the order of rows of ggml's converters. Quantized types become float32 as they
are read, one tensor at a time. None stays quantized: the scales of our int8 and int4 are bfloat16,
and ggml's float16 does not fit them exactly.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from s1engine.errors import ModelError
from s1engine.gguf_file import open_gguf
from s1engine.models.config_reader import ConfigReader
from s1engine.models.fp8_layout import Fp8Layout
from s1engine.models.gguf_config import ROPE_FACTORS, layer_value

DIGEST_BYTES = 256  # of each tensor

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IN_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_OUTSIDE = re.compile(r"(\w+)\.(weight|bias)")
_INTERLEAVED = ("llama",)
"""Architectures whose converter pairs neighbouring rows of q and k instead of a head's halves."""


class GgufCheckpoint:
    """The tensors of a file, memory-mapped: nothing is read before ``read``."""

    def __init__(self, path: Path) -> None:
        self._file = open_gguf(path)
        architecture = self._file.metadata.get("general.architecture")
        self._heads = self._head_counts(str(architecture))
        self._names = {_hf_name(name): name for name in self._file.tensors}
        """GGUF's name of each tensor by the Hugging Face name."""

    def _head_counts(self, architecture: str) -> dict[str, int]:
        """Number of heads by projection whose rows are interleaved."""
        if architecture not in _INTERLEAVED:
            return {}
        keys = [f"{architecture}.attention.{field}" for field in ("head_count", "head_count_kv")]
        values = {key: layer_value(self._file, key) for key in keys}
        metadata = ConfigReader(self._file.path, values)
        heads = metadata.integer(keys[0])
        kv_heads = metadata.integer(keys[1], heads)
        return {".q_proj.": heads, ".k_proj.": kv_heads}

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def check(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        allowed: Callable[[str], bool],
        fp8: Fp8Layout | None = None,
    ) -> None:
        """Raises ModelError unless the tensors are exactly those of ``shapes``. Also allowed:
        tensors that ``allowed`` accepts, and the factors of the rotation."""
        for name, shape in shapes.items():
            if name not in self._names:
                raise ModelError(f"{self._file.path}: tensor {_gguf_name(name)!r} is missing")
            stored = self._file.tensors[self._names[name]].shape
            if stored != shape:
                raise self.error(name, f"has shape {list(stored)}, not {list(shape)}")
        for name in self._names:
            if name not in shapes and not allowed(name) and name != ROPE_FACTORS:
                raise self.error(name, "is not part of this model")

    def is_fp8(self, name: str) -> bool:
        """Is the tensor stored in e4m3? Never: ggml has no such type."""
        return False

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU: float32 if it is stored quantized, else as it is stored."""
        tensor = self._file.read(self._names[name])
        for projection, heads in self._heads.items():
            if projection in name:
                if tensor.shape[0] % (2 * heads):
                    raise self.error(name, f"has {tensor.shape[0]} rows for {heads} heads")
                pairs: Tensor = tensor.unflatten(0, (heads, -1, 2))
                return pairs.transpose(1, 2).flatten(0, 2)
        return tensor

    def weights_digest(self) -> str:
        """A hash of names, types, shapes and the first DIGEST_BYTES bytes of each tensor."""
        digest = hashlib.sha256()
        for name in sorted(self._file.tensors):
            info = self._file.tensors[name]
            digest.update(f"{name} {info.type_name} {list(info.shape)}".encode())
            digest.update(self._file.head(name, DIGEST_BYTES))
        return digest.hexdigest()

    def error(self, name: str, why: str) -> ModelError:
        """An error about tensor ``name``, for the caller to raise; it names GGUF's name."""
        return self._file.tensor_error(self._names[name], why)


def _hf_name(name: str) -> str:
    """The Hugging Face name; an unknown one stays as it is, and no model has it."""
    if match := _IN_LAYER.fullmatch(name):
        layer, leaf, kind = match.groups()
        return f"model.layers.{layer}.{_NAMES[leaf]}.{kind}" if leaf in _NAMES else name
    if match := _OUTSIDE.fullmatch(name):
        leaf, kind = match.groups()
        return f"{_NAMES[leaf]}.{kind}" if leaf in _NAMES else name
    return name


def _gguf_name(name: str) -> str:
    """The inverse of ``_hf_name``."""
    stem, _, kind = name.removeprefix("model.layers.").rpartition(".")
    layer, _, inner = stem.partition(".")
    leaves = {value: key for key, value in _NAMES.items()}
    leaf = leaves.get(stem) or f"blk.{layer}.{leaves.get(inner, inner)}"
    return f"{leaf}.{kind}"
