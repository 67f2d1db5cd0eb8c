"""The bundled model for all tests of the engine, in float32, with caches small enough to fill."""

import pytest
import torch

from s1engine.config import BUNDLED_MODEL
from s1engine.engine.llm import LLM
from s1engine.models.model_config import ModelConfig


@pytest.fixture(scope="session")
def llm() -> LLM:
    """The bundled model with default options."""
    return LLM(progress=False, dtype="float32", max_num_seqs=16, max_num_batched_tokens=256)


@pytest.fixture(scope="session")
def tight() -> LLM:
    """The same model with little memory and few tokens per step: it chunks, preempts and evicts."""
    longest = 448  # tokens; the cache holds one and a half such sequences
    token_bytes = ModelConfig.from_dir(BUNDLED_MODEL).kv_bytes_per_token(torch.float32)
    return LLM(
        progress=False,
        dtype="float32",
        max_num_seqs=8,
        max_num_batched_tokens=24,
        max_model_len=longest,
        kv_cache_memory_gb=1.5 * longest * token_bytes / 2**30,
    )
