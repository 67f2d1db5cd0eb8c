"""After the warm-up no step compiles a kernel."""

import os
import subprocess
import sys
from threading import Thread
from typing import Any

import pytest
from triton.runtime.jit import JITFunction

from s1engine.ops.compile_ahead import compiled_ahead

LATE = """
import random
from dataclasses import replace

import torch
import triton

from s1engine.bench.shapes import shape
from s1engine.models.loader import random_decoder
from s1engine.ops.compile_ahead import compiled_ahead
from s1engine.ops.triton_ops import TritonOps
from s1engine.runner.kernel_warmup import compile_kernels, dummy_sampling, dummy_step
from s1engine.runner.kv_cache import KVCache
from tests.kernels import fake_gpu

fake_gpu.install()
compiled = []
triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: compiled.append(fn.name)
SEQS, VOCAB = 40, 300
model = replace(shape("nano"), num_layers=1, layer_windows=(0,), vocab_size=VOCAB)
decoder = random_decoder(model, torch.bfloat16, "cpu", TritonOps(), quantization=None)
cache = KVCache(model, num_blocks=4, block_size=64, dtype=torch.bfloat16, device="cpu")


def step(rows, longest):
    meta = dummy_step(rows, longest, 64, torch.device("cpu"))
    hidden = decoder.forward(meta.positions, cache.layers, meta)
    return decoder.logits(hidden[:rows].contiguous(), VOCAB)


with torch.inference_mode(), compiled_ahead(progress=False):
    step(1, 512)  # like the step that measures memory
before = len(compiled)
compile_kernels(decoder, cache, max_num_seqs=SEQS, vocab_limit=VOCAB, progress=False)
in_time = len(compiled) - before
rng = random.Random(1)
with torch.inference_mode(), compiled_ahead(progress=False):
    for rows in range(1, SEQS + 1):
        for longest in (1, rng.randint(2, 20), rng.randint(21, 300)):
            logits = step(rows, longest)
            decoder.ops.sample(logits, dummy_sampling(logits, longest % 2 > 0, longest % 3 > 0))
print(in_time, *compiled[before + in_time :])
"""


def test_no_step_compiles_after_the_start() -> None:
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", LATE], env=own, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]
    in_time, *late = found.stdout.split()
    assert int(in_time) > 20 and late == []


def test_only_launches_of_this_thread_and_block_are_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, bool]] = []

    def run(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        seen.append((kernel, warmup))

    def launch(kernel: str) -> None:
        JITFunction.run(kernel, grid=(1,), warmup=False)  # type: ignore[arg-type]

    monkeypatch.setattr(JITFunction, "run", run)
    launch("before")
    with compiled_ahead(progress=False):
        launch("within")
        other = Thread(target=launch, args=("of another thread",))
        other.start()
        other.join()
    launch("after")
    assert seen == [
        ("before", False), ("within", True), ("of another thread", False), ("after", False),
    ]  # fmt: skip
