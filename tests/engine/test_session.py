"""Sessions on disk: a restored one goes on as if it had never left; any other file is refused, and
leaves nothing behind."""

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from s1engine.config import BUNDLED_MODEL
from s1engine.engine import session_file
from s1engine.engine.async_engine import AsyncLLMEngine
from s1engine.engine.llm import LLM
from s1engine.errors import RequestError
from s1engine.models.model_config import ModelConfig
from s1engine.ops.kv_quant import EIGHT_BIT_DTYPES
from s1engine.runner.kv_blocks import is_finite, read_blocks, write_blocks
from s1engine.runner.kv_cache import KVCache
from s1engine.sampling_params import SamplingParams
from tests.tiny_models import make_model
from tests.tiny_tokenizer import CHATML, make_backend

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SIZES: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "max_model_len": 128}
PROMPT = [10 + i * 7 % 60 for i in range(41)]


def save_tiny(folder: Path, family: str, seed: int = 0, **overrides: Any) -> str:
    """A tiny model with a tokenizer."""
    backend = make_backend(CHATML, ())
    size = backend.get_vocab_size()
    sizes = {"vocab_size": size, "intermediate_size": 64, "eos_token_id": 1, **overrides}
    path = make_model(folder, family, seed=seed, **sizes)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=CHATML[2]).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def tiny(model: str) -> Iterator[LLM]:
    with LLM(model, dtype="float32", **SIZES) as llm:
        yield llm


@pytest.fixture(scope="module")
def saved(tiny: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("session") / "s.safetensors"
    (output,) = tiny.generate(PROMPT, GREEDY)
    assert tiny.save_session(output, path) == 48
    return path


def clear(llm: LLM) -> None:
    llm.call(lambda engine: engine.scheduler.clear_cache())


def refused(llm: LLM, path: Path, message: str, param: str = "path", **options: Any) -> None:
    """The file is refused, and the engine is as before."""
    clear(llm)
    before = llm.stats()
    with pytest.raises(RequestError, match=message) as caught:
        llm.restore_session(path, **options)
    assert caught.value.param == param
    llm.call(lambda engine: engine.scheduler.check_integrity())
    assert llm.stats() == before
    assert llm.generate(PROMPT, GREEDY)[0].usage.cached_tokens == 0


@pytest.mark.parametrize(
    ("family", "options", "other"),
    [
        ("llama", {"dtype": "float32"}, {"block_size": 8}),
        ("llama", {"dtype": "bfloat16", "kv_cache_dtype": "int8"}, {"block_size": 32}),
        ("qwen3", {"dtype": "float32", "quantization": "int8"}, {}),
        ("gemma3", {"dtype": "float32"}, {}),  # some layers have a window
        ("mistral", {"dtype": "float32"}, {}),  # all have one
        ("llama", {"dtype": "float32", "model_impl": "transformers"}, {}),
    ],
)
def test_a_restored_session_goes_on_as_if_it_had_never_left(
    tmp_path: Path, family: str, options: dict[str, Any], other: dict[str, Any]
) -> None:
    sizes = {"sliding_window": 16} if family == "mistral" else {}
    path, file = save_tiny(tmp_path, family, **sizes), tmp_path / "session"
    with LLM(path, **SIZES, **options) as first:
        (output,) = first.generate(PROMPT, GREEDY, cache_salt="a")
        assert first.save_session(output, file, cache_salt="a") == 48
        session = [*PROMPT, *output.outputs[0].token_ids]
        (wanted,) = first.generate(session, GREEDY, cache_salt="a")
    assert os.stat(file).st_mode & 0o077 == 0
    with LLM(path, **SIZES, **options, **other) as second:
        size = second.engine.config.block_size
        restored = second.restore_session(file, cache_salt="b")
        assert restored.token_ids == session and restored.pinned is None
        assert restored.num_tokens == 48 // size * size
        assert second.stats().num_free_blocks == second.stats().num_blocks
        (got,) = second.generate(session, GREEDY, cache_salt="b")
        (unsalted,) = second.generate(session, GREEDY)
        second.call(lambda engine: engine.scheduler.check_integrity())
    assert got.usage.cached_tokens == restored.num_tokens and unsalted.usage.cached_tokens == 0
    assert got.outputs == wanted.outputs == unsalted.outputs


def test_a_restored_session_can_be_pinned(tiny: LLM, saved: Path) -> None:
    clear(tiny)
    restored = tiny.restore_session(saved, pin=True)
    assert restored.pinned is not None and restored.pinned.num_tokens == 48
    assert tiny.stats().num_pinned_blocks == 3
    for seed in range(6):
        tiny.generate([(seed + i) % 60 for i in range(90)], GREEDY)
    assert tiny.generate(PROMPT, GREEDY)[0].usage.cached_tokens == 32
    restored.pinned.release()
    assert tiny.call(lambda engine: engine.scheduler.stats().num_pinned_blocks) == 0


def test_what_is_not_cached_is_not_saved(tiny: LLM, tmp_path: Path) -> None:
    clear(tiny)
    with pytest.raises(RequestError, match="prefill it first") as caught:
        tiny.save_session(PROMPT, tmp_path / "s")
    assert caught.value.param == "prompt" and not any(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tiny: LLM, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.generate(PROMPT, GREEDY)
    (tmp_path / "s").write_bytes(b"old")

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(session_file.os, "fsync", full)
    for path in (tmp_path / "s", tmp_path / "none" / "s"):
        with pytest.raises(RequestError, match="cannot be written") as caught:
            tiny.save_session(PROMPT, path)
        assert caught.value.param == "path"
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("s", b"old")]


# --- files that are refused ---


def test_sessions_of_other_models_and_forms_are_refused(
    model: str, saved: Path, tmp_path: Path
) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        (save_tiny(tmp_path, "llama", seed=1), {"dtype": "float32"}, "weights_digest is"),
        (save_tiny(tmp_path, "qwen2"), {"dtype": "float32"}, "architecture is LlamaFor"),
        (model, {"dtype": "bfloat16"}, "kv_cache_dtype is float32"),
        (model, {"dtype": "float32", "kv_cache_dtype": "int8"}, "of this engine int8"),
        (model, {"dtype": "float32", "quantization": "int8"}, "quantization is None"),
        (model, {"dtype": "float32", "model_impl": "transformers"}, "implementation is"),
    ]
    for path, options, message in cases:
        with LLM(path, **SIZES, **options) as llm:
            refused(llm, saved, message)
    with LLM(model, dtype="float32", enable_prefix_caching=False, **SIZES) as llm:
        refused(llm, saved, "enable_prefix_caching is off", "enable_prefix_caching")


def test_a_session_that_is_too_large_is_refused(model: str, saved: Path) -> None:
    block = 16 * ModelConfig.from_dir(model).kv_bytes_per_token(torch.float32)
    sizes = {**SIZES, "max_model_len": None, "kv_cache_memory_gb": 2 * block / 2**30}
    with LLM(model, dtype="float32", **sizes) as llm, pytest.raises(RequestError) as caught:
        llm.restore_session(saved)
    assert caught.value.param == "path" and "48 tokens, and 32 of 32" in str(caught.value)
    with LLM(model, dtype="float32", **SIZES, kv_cache_memory_gb=8 * block / 2**30) as llm:
        refused(llm, saved, "48 tokens cannot be pinned", pin=True)


@settings(max_examples=25)
@given(data=st.data())
def test_a_damaged_file_is_refused(
    tiny: LLM, saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = saved.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    flipped = whole[:at] + bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))]) + whole[at + 1 :]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(whole[:at] if cut else flipped)
    with pytest.raises(RequestError) as caught:
        tiny.restore_session(path)
    assert caught.value.param == "path"


def forged(saved: Path, path: Path, **tensors: Any) -> Path:
    """The same file with other tensors and a checksum that fits."""
    session = session_file.read_session(str(saved))
    kv = tensors.get("kv", session.kv)
    other = session_file.Session(tensors.get("tokens", session.token_ids), kv, session.identity)
    session_file.write_session(str(path), other)
    return path


def test_contents_that_would_do_harm_are_refused(tiny: LLM, saved: Path, tmp_path: Path) -> None:
    session = session_file.read_session(str(saved))
    path = tmp_path / "s"
    infinite = [(k.clone(), v) for k, v in session.kv]
    infinite[1][0][3, 0, 2] = float("nan")
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"tokens": [*session.token_ids[:5], 10**6, *session.token_ids[6:]]},
            "tokens holds 1000000",
        ),
        ({"tokens": [-1, *session.token_ids[1:]]}, "tokens holds -1"),
        ({"tokens": session.token_ids[:40]}, "differ in shape"),
        ({"kv": infinite}, "NaN"),
        ({"kv": session.kv[:1]}, "k and v are"),
        (
            {"kv": [(k[:, :1].contiguous(), v[:, :1].contiguous()) for k, v in session.kv]},
            "k and v are",
        ),
        ({"kv": [(k[:9], v[:9]) for k, v in session.kv]}, "9 tokens with KV"),
        ({"kv": [(k, v.to(torch.bfloat16)) for k, v in session.kv]}, "differ in shape or dtype"),
    ]
    for tensors, message in cases:
        refused(tiny, forged(saved, path, **tensors), message)
    safetensors.torch.save_file({"tokens": torch.zeros(3)}, path)
    refused(tiny, path, "format is None")
    refused(tiny, tmp_path / "none", "No such file")
    refused(tiny, tmp_path, "cannot be read")


# --- blocks ---


@given(
    st.sampled_from([torch.float32, torch.bfloat16, *EIGHT_BIT_DTYPES.values()]),
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(1, 8),
)
@settings(max_examples=30)
def test_blocks_fit_into_a_cache_of_any_block_size_bit_for_bit(
    dtype: torch.dtype, num_blocks: int, size: int, other: int
) -> None:
    config = replace(ModelConfig.from_dir(BUNDLED_MODEL), num_layers=2)
    source = KVCache(config, num_blocks=7, block_size=size, dtype=dtype, device="cpu")
    target = KVCache(config, num_blocks=43, block_size=other, dtype=dtype, device="cpu")
    for layer in source.layers:
        for stored in layer:
            stored.view(torch.uint8).random_(0, 256)
    kv = read_blocks(source, list(range(num_blocks, 0, -1)))
    whole = num_blocks * size // other
    write_blocks(target, list(range(3, 3 + whole)), kv, 0)
    again = read_blocks(target, list(range(3, 3 + whole)))
    for wanted, got in zip(kv, again, strict=True):
        for a, b in zip(wanted, got, strict=True):
            assert a.shape[0] == num_blocks * size and b.shape[0] == whole * other
            assert a[: whole * other].view(torch.uint8).equal(b.view(torch.uint8))


def test_not_a_number_is_seen_in_every_format() -> None:
    for dtype in (torch.float32, torch.bfloat16, *EIGHT_BIT_DTYPES.values()):
        stored = torch.zeros(2, 3, 8, dtype=torch.uint8).view(dtype)
        assert is_finite(stored)
        stored.view(torch.uint8)[1, 2, -4:] = 0xFF  # the scale of a vector in int8
        assert not is_finite(stored)


# --- the asynchronous face ---


async def _round_trip(model: str, path: Path) -> None:
    async with AsyncLLMEngine(model=model, dtype="float32", **SIZES) as engine:
        await engine.warmup(2)
        with await engine.prefill(PROMPT) as pinned:
            assert pinned.num_tokens == 32
            assert await engine.save_session(PROMPT, path) == 32
        restored = await engine.restore_session(path, pin=True)
        assert restored.token_ids == PROMPT and restored.pinned is not None
        events = [event async for event in engine.generate(PROMPT, GREEDY)]
        assert events[-1].usage.cached_tokens == 32  # type: ignore[union-attr]


def test_the_asynchronous_engine_has_the_same(model: str, tmp_path: Path) -> None:
    asyncio.run(_round_trip(model, tmp_path / "s"))
