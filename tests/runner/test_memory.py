"""How much memory the KV cache gets, and the error where nothing fits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from s1engine import _core
from s1engine.bench.bare_engine import make_decoder
from s1engine.bench.shapes import shape
from s1engine.config import BUNDLED_MODEL, EngineConfig
from s1engine.errors import RequestError
from s1engine.models.model_config import ModelConfig
from s1engine.ops import Ops
from s1engine.ops.cpu_ops import CpuOps
from s1engine.ops.torch_ops import TorchOps
from s1engine.runner.memory import GIB, plan_memory
from s1engine.runner.model_runner import run_largest_step
from s1engine.runner.resolved_config import ResolvedConfig, resolve_config

NANO = ModelConfig.from_dir(BUNDLED_MODEL)


def resolved(**options: object) -> ResolvedConfig:
    return resolve_config(EngineConfig(device="cpu", **options))  # type: ignore[arg-type]


def test_activation_memory_is_kept_free() -> None:
    block = 16 * NANO.kv_bytes_per_token(torch.float32)
    config = resolved(kv_cache_memory_gb=20 * block / GIB, max_num_seqs=9)
    assert plan_memory(config, NANO, torch.float32)[1] == 20
    assert plan_memory(config, NANO, torch.float32, activation_bytes=5 * block)[1] == 15


def test_a_windowed_model_needs_memory_for_the_window_only() -> None:
    block = 16 * NANO.kv_bytes_per_token(torch.float32)
    windowed = replace(NANO, layer_windows=(50,) * NANO.num_layers)
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "max_model_len": 400}
    for blocks, model, fits in [(24, NANO, False), (8, windowed, True), (7, windowed, False)]:
        config = resolved(kv_cache_memory_gb=blocks * block / GIB, **options)
        if fits:
            assert plan_memory(config, model, torch.float32) == (400, blocks)
            _core.Scheduler(
                num_blocks=blocks, block_size=16, max_num_seqs=4, max_num_batched_tokens=64,
                max_window=50,
            ).add(0, np.zeros(9, np.int32), max_len=400)  # fmt: skip
        else:
            with pytest.raises(RequestError, match="max_model_len 400 does not fit"):
                plan_memory(config, model, torch.float32)


def test_too_little_memory_names_what_would_fit() -> None:
    cuda = replace(resolved(kv_cache_memory_gb=0.001, block_size=64), device="cuda")
    with pytest.raises(RequestError) as caught:
        plan_memory(cuda, shape("7B"), torch.bfloat16, activation_bytes=3 * GIB)
    for words in ("3.00 GiB", "max_num_batched_tokens (now 2048)", "max_num_seqs (now 256)"):
        assert words in str(caught.value)


@pytest.mark.parametrize("ops", [CpuOps(), TorchOps()])
def test_the_largest_step_computes_finite_logits(ops: Ops) -> None:
    config = resolved(max_num_seqs=5, max_num_batched_tokens=70)
    decoder = make_decoder(NANO, config, ops)
    logits = run_largest_step(decoder, config, vocab_limit=30)
    assert logits.shape == (5, 30) and bool(logits.isfinite().all())
    torch.testing.assert_close(logits, logits[:1].expand(5, -1))


def test_sizes_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (resolved().block_size, resolved().run_ahead) == (16, 1)
    assert (resolved(block_size=4).block_size, resolved(run_ahead=3).run_ahead) == (4, 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    auto = resolve_config(EngineConfig())
    assert (auto.device, auto.block_size, auto.run_ahead) == ("cuda", 64, 8)
    assert resolve_config(EngineConfig(enforce_eager=True)).run_ahead == 1


def test_a_missing_device_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(RequestError, match=r"^device cuda: no CUDA device is available$"):
        resolve_config(EngineConfig(device="cuda"))
