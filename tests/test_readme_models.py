"""README.md's table of models: its sizes follow from the published shapes of the models."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from s1engine.models.model_config import ModelConfig
from s1engine.models.weight_bytes import weight_bytes
from s1engine.reasoning_specs import FORMAT_SPECS

README = Path(__file__).resolve().parent.parent / "README.md"
ROW = re.compile(r"^\| `([\w./-]+)`.*\| native \| (.+) \|$", re.MULTILINE)
SIZE_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Architecture; the fields above; KV heads, vocabulary, head size (0: hidden size / heads), tied.
Shape = tuple[str, int, int, int, int, int, int, int, bool]
SHAPES: dict[str, Shape] = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (
        *("Qwen2ForCausalLM", 1536, 8960, 28, 12, 2, 151936, 0, False),
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (
        *("Qwen2ForCausalLM", 3584, 18944, 28, 28, 4, 152064, 0, False),
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": (
        *("LlamaForCausalLM", 4096, 14336, 32, 32, 8, 128256, 0, False),
    ),
    "simplescaling/s1.1-32B": ("Qwen2ForCausalLM", 5120, 27648, 64, 40, 8, 152064, 0, False),
    "Qwen/QwQ-32B": ("Qwen2ForCausalLM", 5120, 27648, 64, 40, 8, 152064, 0, False),
    "Qwen/Qwen3-0.6B": ("Qwen3ForCausalLM", 1024, 3072, 28, 16, 8, 151936, 128, True),
    "Qwen/Qwen3-4B-Thinking-2507": ("Qwen3ForCausalLM", 2560, 9728, 36, 32, 8, 151936, 128, True),
    "Qwen/Qwen3-8B": ("Qwen3ForCausalLM", 4096, 12288, 36, 32, 8, 151936, 128, False),
    "Qwen/Qwen3-32B": ("Qwen3ForCausalLM", 5120, 25600, 64, 64, 8, 151936, 128, False),
    "microsoft/Phi-4-reasoning": ("Phi3ForCausalLM", 5120, 17920, 40, 40, 10, 100352, 0, False),
    "mistralai/Magistral-Small-2509": (
        *("MistralForCausalLM", 5120, 32768, 40, 32, 8, 131072, 128, False),
    ),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": (
        *("SeedOssForCausalLM", 5120, 27648, 64, 80, 8, 155136, 128, False),
    ),
    "HuggingFaceTB/SmolLM3-3B": ("SmolLM3ForCausalLM", 2048, 11008, 36, 16, 4, 128256, 0, True),
    "allenai/Olmo-3-7B-Think": ("Olmo3ForCausalLM", 4096, 11008, 32, 32, 32, 100278, 0, False),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        *("LlamaForCausalLM", 576, 1536, 30, 9, 3, 49152, 0, True),
    ),
}


def published(shape: Shape, file: Path) -> ModelConfig:
    """The model of a shape, whose config.json is written to ``file``."""
    architecture, *sizes, kv_heads, vocab_size, head_dim, tied = shape
    config: dict[str, Any] = {
        **dict(zip(SIZE_FIELDS, sizes, strict=True)),
        "architectures": [architecture],
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "dtype": "bfloat16",
    }
    if architecture == "Olmo3ForCausalLM":
        config["sliding_window"] = 4096
    if architecture == "SeedOssForCausalLM":
        config |= {"attention_bias": True, "attention_out_bias": False}
    if head_dim:
        config["head_dim"] = head_dim
    file.write_text(json.dumps(config))
    return ModelConfig.from_file(file)


def size_cells(config: ModelConfig) -> str:
    """Parameters, weights in bfloat16, fp8 and int4 (GB), and KV cache of 1,000 tokens (MB)."""
    weights = (weight_bytes(config, torch.bfloat16, fmt).total for fmt in (None, "fp8", "int4"))
    cells = [_short(config.num_parameters), *map(_short, weights)]
    return " | ".join([*cells, f"{config.kv_bytes_per_token(torch.bfloat16) / 1000:.0f}"])


def _short(number: float) -> str:
    """A number of units of 10^9, in three digits or fewer."""
    return f"{number / 1e9:.{2 if number < 1e9 else 1}f}"


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_follow_from_the_shape(name: str, tmp_path: Path) -> None:
    rows = dict(ROW.findall(README.read_text()))
    assert rows[name] == size_cells(published(SHAPES[name], tmp_path / "config.json"))


def test_each_row_has_a_shape_and_a_known_format() -> None:
    text = README.read_text()
    assert set(dict(ROW.findall(text))) == set(SHAPES)
    for line in text.splitlines():
        if ROW.match(line):
            formats = set(re.findall(r"`([\w-]+)`", line.split("|")[2]))
            assert formats <= {*FORMAT_SPECS} and (formats or "does not think" in line), line
