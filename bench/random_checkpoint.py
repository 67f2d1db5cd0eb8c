"""A Hugging Face directory with random weights, the same for every measured engine.

Matrices have deviation 1/sqrt(inputs), so that the output depends on all layers and engines agree
only if they compute the same model. The tokenizer has as many tokens as the embedding.
"""

import json
import math
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from s1engine.models.model_config import ModelConfig

EOS = 1


def random_checkpoint(model: ModelConfig, name: str, root: Path) -> Path:
    """The directory ``root / name`` with weights of that shape; written once, atomically."""
    path = root / name
    if not path.exists():
        part = root / f"{name}.part"
        part.mkdir(parents=True, exist_ok=True)
        _write(model, part)
        part.rename(path)
    return path


def _write(model: ModelConfig, path: Path) -> None:
    (path / "config.json").write_text(json.dumps(_config(model), indent=1))
    generation = {"do_sample": False, "eos_token_id": EOS}
    (path / "generation_config.json").write_text(json.dumps(generation))
    save_file(_weights(model), path / "model.safetensors", metadata={"format": "pt"})
    _backend(model.vocab_size).save(str(path / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(special))


def _config(model: ModelConfig) -> dict[str, Any]:
    """config.json in a form that every version of transformers reads."""
    assert model.architecture == "Qwen2ForCausalLM" and model.rope.scaling is None
    return {
        "architectures": [model.architecture],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope.theta,
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_sliding_window": False,
        "eos_token_id": EOS,
        "torch_dtype": "bfloat16",
    }


def _weights(model: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            return mean + 0.1 * torch.randn(shape, generator=generator)
        deviation = 1 / math.sqrt(shape[1])
        return deviation * torch.randn(shape, generator=generator)

    return {
        name: tensor(name, shape).to(torch.bfloat16)
        for name, shape in model.tensor_shapes().items()
    }


def _backend(size: int) -> tokenizers.Tokenizer:
    """A tokenizer of bytes and invented words, ``size`` tokens in all."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", "<|im_end|>", *alphabet]
    words += [f"Ġw{i}" for i in range(size - len(words))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={word: i for i, word in enumerate(words[:size])}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    return backend
