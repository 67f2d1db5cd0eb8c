"""Every native family through scheduler and runner on the CPU: the same greedy tokens as
transformers, with recorded steps, chunked prompts, cached prefixes and full batches."""

from pathlib import Path
from typing import Any

import pytest
import torch

from s1engine.bench.bare_engine import BareEngine, Job
from s1engine.config import EngineConfig
from s1engine.models.loader import load_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.ops.cpu_ops import CpuOps
from tests.models.harness import oracle
from tests.tiny_models import make_model

NEW = 20
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 12},
    "ministral3": {},
    "mistral3": {},
    "phi3": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "seed_oss": {},
    "smollm3": {},
    "olmo2": {},
    "olmo3": {},
    "gemma3": {"sliding_window_pattern": 2},
    "gemma3_wrapper": {"tie_word_embeddings": True},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts() -> list[list[int]]:
    """Some share a beginning of 40 tokens; they have from 3 to 70."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(10, 96, (400,), generator=generator).tolist()
    begin = ids[:40]
    return [
        begin + ids[40:70],
        begin + ids[80:84],
        ids[100:103],
        begin + ids[110:130],
        ids[140:190],
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(tmp_path: Path, family: str) -> None:
    path = make_model(tmp_path, family, **FAMILIES[family])
    model = ModelConfig.from_dir(path)
    decoder = load_decoder(path, model, torch.float32, "cpu", CpuOps(), max_positions=128)
    config = EngineConfig(
        device="cpu", dtype="float32", max_num_seqs=4, max_num_batched_tokens=24,
        max_model_len=128, block_size=8,
    )  # fmt: skip
    engine = BareEngine(config, model, decoder)
    first = engine.add(Job(prompt=prompts()[0], max_new=NEW))
    engine.run_jobs()  # the others find its blocks
    names = [first, *(engine.add(Job(prompt=prompt, max_new=NEW)) for prompt in prompts()[1:])]
    engine.run_jobs()
    reference = oracle(path)
    for prompt, name in zip(prompts(), names, strict=True):
        whole = reference.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        assert engine.output_tokens(name) == whole[0, len(prompt) :].tolist()
    stats = engine.scheduler.stats()
    assert stats.prefix_hits > 0 and engine.runner._cpu_graph is not None
