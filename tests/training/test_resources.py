"""The memory estimate against counted live tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from s1engine.errors import RequestError
from s1engine.training.sft import resources
from s1engine.training.sft.distributed import DistributedContext, init_distributed
from s1engine.training.sft.model import load_model
from s1engine.training.sft.optimizer import clip_gradients, create_optimizer
from s1engine.training.sft.packing import PackedRow
from s1engine.training.sft.samples import TokenizedSample
from s1engine.training.sft.sft_config import SftConfig
from tests.training.live_bytes import LiveBytes

NAMES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
SHAPES: dict[str, tuple[Any, ...]] = {
    "activations": (64, 176, 4, 4, 2, 500, True),
    "weights": (128, 350, 3, 4, 2, 2000, False),
    "deep": (64, 160, 8, 4, 4, 300, False),
}


@pytest.fixture(scope="module")
def distributed() -> Iterator[DistributedContext]:
    with init_distributed(1) as context:
        yield context


@pytest.mark.parametrize(
    ("shape", "dtype", "checkpointing"),
    [
        ("activations", "float32", True),
        ("activations", "float32", False),
        ("activations", "bfloat16", True),
        ("activations", "bfloat16", False),
        ("weights", "float32", True),
        ("deep", "bfloat16", True),
    ],
)
def test_memory_is_within_15_percent_of_live_tensors(
    distributed: DistributedContext, shape: str, dtype: str, checkpointing: bool
) -> None:
    """At the second micro-batch of a step, when gradients exist already."""
    tokens = 96 if shape == "weights" else 192
    config = SftConfig.from_dict({
        "data": ["-"], "out": "-", "tokenizer": "-", "block_size": tokens, "loss_chunk": 64,
        "gradient_checkpointing": checkpointing, "compute_dtype": dtype,
        "architecture": {"model_type": "qwen2", **dict(zip(NAMES, SHAPES[shape], strict=True))},
    })  # fmt: skip
    model = load_model(config, distributed)
    optimizer = create_optimizer(model, config)
    row = PackedRow.from_samples([TokenizedSample(tuple(i % 100 for i in range(tokens)), 1, "")])

    def step() -> None:
        for _ in range(2):
            model(row).backward()
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # creates the optimizer's state
    counter = LiveBytes()
    counter.watch(*model.parameters())
    counter.watch(*(t for state in optimizer.state.values() for t in state.values()))
    with counter:
        step()
    architecture: Any = model.lm.config
    memory = resources.estimate_memory(config, architecture, tokens, 1)
    assert memory.total == pytest.approx(counter.peak, rel=0.15), counter.peak_op
    shards = memory.weights + memory.gradients + memory.optimizer
    assert memory.total - shards == pytest.approx(counter.peak - shards, rel=0.3), counter.peak_op


def test_offloading_the_state_of_a_cpu_is_refused(distributed: DistributedContext) -> None:
    config = SftConfig.read(Path("s1_nano"), offload="state")
    with pytest.raises(RequestError, match="offload"):
        load_model(config, distributed)


def test_offloaded_activations_change_no_gradient(distributed: DistributedContext) -> None:
    """Saved layer inputs are copied to host memory and back; the gradients stay the same."""
    architecture = {"model_type": "qwen2", **dict(zip(NAMES, SHAPES["deep"], strict=True))}
    gradients = []
    for offload in ("none", "activations"):
        config = SftConfig.from_dict({
            "data": ["-"], "out": "-", "tokenizer": "-", "block_size": 64, "offload": offload,
            "compute_dtype": "float32", "architecture": architecture,
        })  # fmt: skip
        model = load_model(config, distributed)
        model(PackedRow.from_samples([TokenizedSample(tuple(range(64)), 1, "")])).backward()
        gradients.append([p.grad.full_tensor() for p in model.parameters()])  # type: ignore
        memory = resources.estimate_memory(config, model.lm.config, 64, 1)
        assert (memory.host > 0) == (offload == "activations")
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
