"""A model whose every layer has a sliding window, on contexts of many windows: transformers' greedy
tokens, in memory for the windows only, alone or batched, preempted, cached or with checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from s1engine import _core
from s1engine.bench.bare_engine import BareEngine, Job
from s1engine.config import EngineConfig
from s1engine.models.decoder import Decoder
from s1engine.models.loader import load_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.ops.cpu_ops import CpuOps
from tests.models.harness import oracle
from tests.tiny_models import make_model

WINDOW, BLOCK = 32, 4
CONFIG = EngineConfig(
    device="cpu", dtype="float32", block_size=BLOCK, max_num_seqs=4, max_num_batched_tokens=24
)
PROMPTS = [
    [(7 * i + 3 * seed) % 90 + 4 for i in range(n)] for seed, n in enumerate((90, 50, 3, 75))
]
SHORT = [[5, 6, 7, 8], [9, 5, 6], [11, 12, 13, 14]]
NEW = 60


class Windowed:
    """A tiny Mistral with a window, in transformers and here."""

    def __init__(self, path: Path) -> None:
        path = make_model(path, "mistral", sliding_window=WINDOW)
        self.config = ModelConfig.from_dir(path)
        self.decoder: Decoder = load_decoder(path, self.config, torch.float32, "cpu", CpuOps())
        model = oracle(path)
        self.expected = [greedy(model, prompt) for prompt in PROMPTS]
        self.expected_short = [greedy(model, prompt) for prompt in SHORT]

    def engine(self, num_blocks: int, **options: Any) -> BareEngine:
        block_bytes = BLOCK * self.config.kv_bytes_per_token(torch.float32)
        memory = num_blocks * block_bytes / 2**30
        config = replace(CONFIG, kv_cache_memory_gb=memory, **options)
        engine = BareEngine(config, self.config, self.decoder)
        assert engine.runner.num_blocks == num_blocks
        return engine


def greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(NEW):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Windowed:
    return Windowed(tmp_path_factory.mktemp("windowed"))


def run(engine: BareEngine, prompts: list[list[int]]) -> list[list[int]]:
    """Outputs of the prompts, in one batch as far as it goes."""
    ids = [engine.add(Job(prompt=prompt, max_new=NEW)) for prompt in prompts]
    while engine.scheduler.has_unfinished():
        engine.step()
        engine.scheduler.check_integrity()
    return [engine.output_tokens(i) for i in ids]


def blocks_of(interval: int) -> int:
    """Blocks that an interval of a sequence touches at most."""
    return (interval + BLOCK - 2) // BLOCK + 1


def test_the_model_has_a_window_that_counts(windowed: Windowed) -> None:
    assert windowed.config.max_window == WINDOW
    full = replace(windowed.config, layer_windows=(0,) * windowed.config.num_layers)
    engine = BareEngine(CONFIG, full, Decoder(full, windowed.decoder.weights, CpuOps()))
    assert run(engine, PROMPTS) != windowed.expected


def test_greedy_tokens_equal_transformers_in_memory_for_the_windows(windowed: Windowed) -> None:
    engine = windowed.engine(200)
    ids = [engine.add(Job(prompt=prompt, max_new=NEW)) for prompt in PROMPTS]
    most = 0
    while engine.scheduler.has_unfinished():
        engine.step()
        stats = engine.scheduler.stats()
        used = 200 - stats.num_free_blocks
        assert used <= stats.num_running * blocks_of(WINDOW - 1 + CONFIG.max_num_batched_tokens)
        if engine.runner.batch.core.num_samples == 4 and stats.num_running == 4:
            most = max(most, used)
    assert [engine.output_tokens(i) for i in ids] == windowed.expected
    assert 0 < most <= 4 * blocks_of(WINDOW + 1)  # of contexts of up to 150 tokens


@pytest.mark.parametrize("recorded", [True, False])
def test_a_sequence_alone_equals_the_batch(windowed: Windowed, recorded: bool) -> None:
    for prompt, expected in zip(PROMPTS, windowed.expected, strict=True):
        engine = windowed.engine(40, enforce_eager=not recorded)
        assert run(engine, [prompt]) == [expected]


def test_preempted_sequences_equal_others(windowed: Windowed) -> None:
    """In the smallest cache that the engine accepts."""
    engine = windowed.engine(blocks_of(WINDOW - 1 + CONFIG.max_num_batched_tokens))
    assert run(engine, SHORT) == windowed.expected_short
    assert engine.scheduler.stats().num_preemptions > 0


def test_a_cached_prefix_changes_nothing(windowed: Windowed) -> None:
    engine = windowed.engine(200)
    assert run(engine, PROMPTS) == windowed.expected
    assert engine.scheduler.stats().prefix_hits == 0
    assert run(engine, PROMPTS) == windowed.expected
    assert engine.scheduler.stats().prefix_hits > 200
    longer = [prompt + new for prompt, new in zip(PROMPTS, windowed.expected, strict=True)]
    extended = run(engine, [tokens[:-20] for tokens in longer])
    assert [tokens[:20] for tokens in extended] == [new[-20:] for new in windowed.expected]


def test_drafts_change_nothing(windowed: Windowed) -> None:
    engine = windowed.engine(200, num_speculative_tokens=3)
    assert run(engine, PROMPTS) == windowed.expected


def think(engine: BareEngine, maximum: int, checkpoints: list[tuple[int, int]]) -> list[list[int]]:
    """Tokens of the sequence that thinks up to ``maximum``, and of its branches."""
    job = Job(prompt=PROMPTS[1], max_new=NEW)
    ids = [0, *(branch for _, branch in checkpoints)]
    engine._jobs.update(dict.fromkeys(ids, job))
    budget = _core.BudgetParams(
        format=engine._format, wait=[5, 6], forced_end=[3, 7, 8], delimiter_len=1,
        min_thinking=30, num_waits=3,
    )  # fmt: skip
    engine.scheduler.add(
        0, np.array(job.prompt, np.int32), max_len=len(job.prompt) + NEW, budget=budget,
        thinking_tokens=0, max_thinking=maximum, checkpoints=checkpoints,
    )  # fmt: skip
    engine.run_jobs()
    return [engine.output_tokens(i) for i in ids]


@pytest.mark.parametrize("num_blocks", [200, 16])
def test_checkpoints_equal_separate_runs(windowed: Windowed, num_blocks: int) -> None:
    """With room for the parent's expired blocks, and without: then branches compute them anew."""
    swept = think(windowed.engine(num_blocks), 45, [(32, 1), (38, 2)])
    separate = [think(windowed.engine(200), maximum, [])[0] for maximum in (45, 32, 38)]
    assert swept == separate
