"""Writes GGUF files of tiny models as ggml's converter does: names, order of rows, tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import load_file

from tests.tiny_tokenizer import CHATML, TEMPLATE, make_backend

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
ARCHITECTURES |= {"qwen3": gguf.MODEL_ARCH.QWEN3}
NUM_TOKENS = make_backend().get_vocab_size()
KINDS = {"Q4_K": "random", "Q5_K": "random", "Q6_K": "random"}  # the library cannot quantize these


def write_gguf(
    file: Path,
    model: Path,
    kind: str = "F32",
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    """The model of a Hugging Face directory with its matrices in type ``kind``; returns ``file``.

    ``fields``: more metadata, or other values; None leaves a field out. ``tensors``: more of them.
    """
    config = json.loads((model / "config.json").read_text())
    family = config["model_type"]
    writer = GGUFWriter(file, family)
    for key, value in {**_metadata(config), **_tokenizer(), **(fields or {})}.items():
        _add(writer, key, value)
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], config["num_hidden_layers"])
    for name, tensor in load_file(model / "model.safetensors").items():
        if family == "llama":
            tensor = interleaved(name, tensor, config)
        stored = names.get_name(name, (".weight", ".bias"))
        assert stored is not None, name
        _add_tensor(writer, stored, tensor, kind)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    write(writer)
    return file


def write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(name: str, tensor: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Rows of q and k as llama's converter stores them: pairs of the rotation are neighbours."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    for part, field in heads.items():
        if part in name:
            halves = tensor.reshape(config[field], 2, -1, *tensor.shape[1:])
            return halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    fields = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_parameters"]["rope_theta"],
        "rope.dimension_count": head_dim,
    }
    if config["model_type"] == "qwen3":
        fields |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    return {f"{config['model_type']}.{key}": value for key, value in fields.items()} | {
        "general.name": "tiny"
    }


def _tokenizer() -> dict[str, Any]:
    backend = make_backend()
    tokens = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(backend.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [token for token, _ in tokens],
        "tokenizer.ggml.token_type": [3 if token in CHATML else 1 for token, _ in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": backend.token_to_id(CHATML[-1]),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _add_tensor(writer: GGUFWriter, name: str, tensor: torch.Tensor, kind: str) -> None:
    values = tensor.float().numpy()
    if values.ndim == 1:
        writer.add_tensor(name, values)
        return
    qtype = GGMLQuantizationType[kind]
    data = random_blocks(values.shape, qtype) if kind in KINDS else quants.quantize(values, qtype)
    writer.add_tensor(name, data, raw_dtype=qtype)


def random_blocks(shape: tuple[int, ...], qtype: GGMLQuantizationType, seed: int = 0) -> Any:
    """Random bytes of a quantized matrix, with scales near 0.003: uint8 [rows, bytes of a row]."""
    values, size = gguf.GGML_QUANT_SIZES[qtype]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // values, size), np.uint8)
    scale = np.frombuffer(np.float16(0.003).tobytes(), np.uint8)
    where = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(qtype.name, ())
    for at in where:
        blocks[..., at : at + 2] = scale
    return blocks.reshape(*shape[:-1], -1)
