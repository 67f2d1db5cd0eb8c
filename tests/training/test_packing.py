"""Packing: no sample is lost or too long, and a packed row equals its separate samples."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from s1engine.training.sft.model import PACKED_ATTENTION, SftModel, prepare_model
from s1engine.training.sft.packing import PackedRow, pack, schedule
from s1engine.training.sft.samples import TokenizedSample
from s1engine.training.sft.sft_config import SftConfig
from tests.training.small_runs import SHAPE

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def config(**fields: object) -> SftConfig:
    given = {"data": ["-"], "out": "-", "model": "-", "block_size": 50, **fields}
    return SftConfig.from_dict(given)


@given(lengths)
def test_bins_hold_every_sample_once_and_fit(sizes: list[int]) -> None:
    bins = pack(sizes, 50)
    assert sorted(index for one in bins for index in one) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in one) <= 50 for one in bins)


@given(lengths)
def test_any_two_bins_overflow_together(sizes: list[int]) -> None:
    loads = sorted(sum(sizes[index] for index in one) for one in pack(sizes, 50))
    assert len(loads) == 1 or loads[0] + loads[1] > 50


@given(lengths, st.booleans(), st.integers(1, 7), st.integers(0, 9))
def test_every_epoch_takes_every_sample_once(
    sizes: list[int], packing: bool, batch_rows: int, seed: int
) -> None:
    recipe = config(packing=packing, batch_rows=batch_rows, seed=seed, epochs=3)
    steps = schedule(sizes, recipe)
    assert steps == schedule(sizes, recipe)
    assert len(steps) % 3 == 0
    steps_per_epoch = len(steps) // 3
    for epoch in range(3):
        part = steps[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch]
        packed = [index for step in part for row in step for index in row]
        assert sorted(packed) == list(range(len(sizes)))
        assert all(len(step) == batch_rows for step in part[:-1])


def create_model(seed: int) -> SftModel:
    torch.manual_seed(seed)
    fields = dict(SHAPE)
    lm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields),
        attn_implementation=PACKED_ATTENTION,
    )
    return SftModel(prepare_model(lm, config(gradient_checkpointing=False)), config(loss_chunk=7))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return grads


@settings(max_examples=15)
@given(st.integers(0, 99), st.lists(st.integers(2, 40), min_size=2, max_size=5))
def test_a_packed_row_equals_its_samples_alone(seed: int, sizes: list[int]) -> None:
    """Loss and every gradient: no sample sees another, and positions restart."""
    rng = random.Random(seed)
    samples = [
        TokenizedSample(tuple(rng.randrange(320) for _ in range(n)), rng.randrange(n), "")
        for n in sizes
    ]
    model = create_model(seed)
    together = model(PackedRow.from_samples(samples))
    together.backward()
    packed = gradients(model)
    alone = sum(model(PackedRow.from_samples([sample])) for sample in samples)
    assert isinstance(alone, torch.Tensor)
    alone.backward()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)
    for a, b in zip(packed, gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_the_loss_is_transformers_own_on_the_completion() -> None:
    """The oracle: transformers' attention and loss over one sample with masked labels."""
    rng = random.Random(0)
    sample = TokenizedSample(tuple(rng.randrange(320) for _ in range(30)), 11, "")
    model = create_model(3)
    own = model(PackedRow.from_samples([sample])) / sample.num_targets
    lm = model.lm
    lm.set_attn_implementation("eager")  # type: ignore[operator]
    ids = torch.tensor([sample.ids])
    labels = ids.clone()
    labels[:, :11] = -100
    torch.testing.assert_close(own, lm(input_ids=ids, labels=labels).loss)
