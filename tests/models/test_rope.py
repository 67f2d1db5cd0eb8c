"""Tables of cosines and sines against those of transformers, at the sizes of real models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from s1engine.models.config_reader import ConfigReader
from s1engine.models.rope import Rope, extended_positions, parse_rope
from s1engine.models.rope_table import cos_sin_table

LENGTH = 2000

KINDS: dict[str, dict[str, Any]] = {
    "qwen2.5": {"rope_theta": 1e6},
    "llama-3.1": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "qwen2.5-yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 16.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 0.7,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-low-theta": {
        "rope_type": "yarn",
        "rope_theta": 50.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
    },
}


def fields(**values: Any) -> ConfigReader:
    return ConfigReader(Path("config.json"), values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tables_equal_transformers(kind: str, head_dim: int) -> None:
    config = LlamaConfig(
        head_dim=head_dim, max_position_embeddings=131072, rope_parameters=dict(KINDS[kind])
    )
    positions = torch.arange(LENGTH)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    rope = parse_rope(fields(rope_parameters=KINDS[kind]), 131072)
    table = cos_sin_table(head_dim, rope, LENGTH)
    half = head_dim // 2
    # An angle of 2000 radians has a last bit of 1.2e-4: frequencies may differ by one rounding.
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], atol=5e-4, rtol=0)
    torch.testing.assert_close(table[:, half:], sin[0, :, :half], atol=5e-4, rtol=0)
    torch.testing.assert_close(table[:50, half:], sin[0, :50, :half], atol=1e-5, rtol=0)


def test_old_and_new_spellings_agree() -> None:
    llama3 = {key: value for key, value in KINDS["llama-3.1"].items() if key != "rope_theta"}
    new = parse_rope(fields(rope_parameters=KINDS["llama-3.1"]), 131072)
    assert parse_rope(fields(rope_theta=500000.0, rope_scaling=llama3), 131072) == new
    oldest = {"type" if key == "rope_type" else key: value for key, value in llama3.items()}
    assert parse_rope(fields(rope_theta=500000.0, rope_scaling=oldest), 131072) == new
    assert parse_rope(fields(rope_theta=7e5, rope_scaling=None), 4096) == Rope(theta=7e5)
    assert parse_rope(fields(), 4096) == Rope(theta=1e4)


def test_only_yarn_extends_the_context() -> None:
    yarn = parse_rope(fields(rope_parameters=KINDS["qwen2.5-yarn"]), 32768)
    assert extended_positions(yarn, 32768) == 131072
    assert extended_positions(yarn, 200_000) == 200_000
    llama3 = parse_rope(fields(rope_parameters=KINDS["llama-3.1"]), 131072)
    assert extended_positions(llama3, 131072) == 131072
    assert extended_positions(Rope(), 4096) == 4096
