"""An int8 KV cache: the same promises, more tokens, nearly the same logits."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.bench.studies.quantized_kv_cache import difference, forced_logits, traces_of
from s1engine.config import BUNDLED_MODEL, EngineConfig
from s1engine.engine.llm import LLM
from s1engine.errors import RequestError
from s1engine.models.loader import load_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.ops.torch_ops import TorchOps
from s1engine.sampling_params import SamplingParams
from tests.engine.test_promises import budgets, chat, check_promises, greedy

LONGEST = 448  # tokens
TOKEN_BYTES = ModelConfig.from_dir(BUNDLED_MODEL).kv_bytes_per_token(torch.int8)


@pytest.fixture(scope="module")
def int8() -> LLM:
    """The bundled model with memory for everything."""
    return LLM(
        progress=False,
        dtype="float32",
        kv_cache_dtype="int8",
        max_num_seqs=16,
        max_num_batched_tokens=256,
    )


@pytest.fixture(scope="module")
def tight_int8() -> LLM:
    """Like ``tight``: memory for one and a half sequences in int8."""
    return LLM(
        progress=False,
        dtype="float32",
        kv_cache_dtype="int8",
        max_num_seqs=8,
        max_num_batched_tokens=24,
        max_model_len=LONGEST,
        kv_cache_memory_gb=1.5 * LONGEST * TOKEN_BYTES / 2**30,
    )


@settings(max_examples=4)
@given(st.lists(st.tuples(st.integers(0, 11), budgets()), min_size=1, max_size=6))
def test_batched_preempted_and_cached_equal_alone_and_cold(
    int8: LLM, tight_int8: LLM, asked: list[tuple[int, SamplingParams]]
) -> None:
    chats, params = [chat(index) for index, _ in asked], [p for _, p in asked]
    crowded = tight_int8.chat(chats, params, progress=False)
    tight_int8.engine.scheduler.check_integrity()
    for one, p, got in zip(chats, params, crowded, strict=True):
        int8.engine.scheduler.clear_cache()
        alone = int8.chat(one, p, progress=False)[0]
        check_promises(alone, p)
        assert got.outputs[0] == alone.outputs[0]


def test_the_tight_engine_preempts_and_shares(tight_int8: LLM) -> None:
    """In this test or an earlier one: after a preemption the scheduler admits more carefully."""
    tight_int8.chat([chat(i // 2) for i in range(6)], greedy(min_tokens=190), progress=False)
    stats = tight_int8.engine.scheduler.stats()
    assert stats.num_preemptions > 0 and stats.prefix_hits > 0


def test_checkpoints_equal_separate_runs(int8: LLM, tight_int8: LLM) -> None:
    swept = greedy(min_tokens=10, num_waits=2, checkpoints=(10, 17, 40))
    for engine in (int8, tight_int8):
        got = engine.chat([chat(3), chat(4)], swept, progress=False)[0]
        assert [checkpoint.budget for checkpoint in got.checkpoints] == [10, 17, 40]
        for checkpoint in got.checkpoints:
            int8.engine.scheduler.clear_cache()
            separate = greedy(min_tokens=10, num_waits=2, max_tokens=checkpoint.budget)
            alone = int8.chat(chat(3), separate, progress=False)[0].outputs[0]
            assert checkpoint.output.token_ids == alone.token_ids


@pytest.mark.parametrize(("cache_dtype", "most"), [(torch.int8, 0.02), (torch.float8_e4m3fn, 0.05)])
def test_the_error_is_small_and_not_zero(llm: LLM, cache_dtype: torch.dtype, most: float) -> None:
    """On the model's own traces, teacher-forced."""
    path = Path(llm.engine.config.model)
    model = ModelConfig.from_dir(path)
    decoder = load_decoder(path, model, torch.float32, "cpu", TorchOps())
    found = []
    for prompt, output in traces_of(llm, 3):
        full = forced_logits(decoder, [*prompt, *output], torch.float32)
        assert bool(
            (full[len(prompt) - 1 : -1].argmax(-1) == torch.tensor(output)).float().mean() > 0.7
        )
        found.append(difference(full, forced_logits(decoder, [*prompt, *output], cache_dtype)))
    assert all(0 < case["kl_mean"] < most and case["greedy_agreement"] > 0.9 for case in found)


def test_blocks_are_counted_in_their_own_type(int8: LLM, llm: LLM) -> None:
    own = ModelConfig.from_dir(BUNDLED_MODEL).kv_bytes_per_token(torch.float32)
    assert 3 < own / TOKEN_BYTES < 4
    cache = int8.engine.runner.kv_cache
    bytes_held = sum(k.nbytes + v.nbytes for k, v in cache.layers)
    assert bytes_held == cache.num_tokens * TOKEN_BYTES


def test_an_unsupported_cache_dtype_is_refused_at_start() -> None:
    with pytest.raises(RequestError, match="fp8 is not covered on the CPU") as caught:
        LLM(progress=False, device="cpu", kv_cache_dtype="fp8")
    assert caught.value.param == "kv_cache_dtype"
    with pytest.raises(RequestError, match="auto, int8, fp8"):
        EngineConfig(kv_cache_dtype="int4")
