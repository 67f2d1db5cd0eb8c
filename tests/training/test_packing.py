"""Packing: nothing lost, nothing too long, and a row is worth its samples one by one."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from s1engine.training.sft.model import PACKED, SftModel, prepared
from s1engine.training.sft.packing import PackedRow, num_targets, pack, schedule
from s1engine.training.sft.samples import Sample
from s1engine.training.sft.sft_config import SftConfig
from tests.training.runs import SHAPE

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def config(**fields: object) -> SftConfig:
    given = {"data": ["-"], "out": "-", "model": "-", "block_size": 50, **fields}
    return SftConfig.from_dict(given)


@given(lengths)
def test_bins_hold_everything_once_and_no_more_than_fits(sizes: list[int]) -> None:
    bins = pack(sizes, 50)
    assert sorted(index for found in bins for index in found) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in found) <= 50 for found in bins)


@given(lengths)
def test_any_two_bins_overflow_together(sizes: list[int]) -> None:
    loads = sorted(sum(sizes[index] for index in found) for found in pack(sizes, 50))
    assert len(loads) == 1 or loads[0] + loads[1] > 50


@given(lengths, st.booleans(), st.integers(1, 7), st.integers(0, 9))
def test_every_epoch_takes_every_sample_once(
    sizes: list[int], packing: bool, batch_rows: int, seed: int
) -> None:
    made = config(packing=packing, batch_rows=batch_rows, seed=seed, epochs=3)
    steps = schedule(sizes, made)
    assert steps == schedule(sizes, made)
    assert len(steps) % 3 == 0
    an_epoch = len(steps) // 3
    for epoch in range(3):
        part = steps[epoch * an_epoch : (epoch + 1) * an_epoch]
        taken = [index for step in part for row in step for index in row]
        assert sorted(taken) == list(range(len(sizes)))
        assert all(len(step) == batch_rows for step in part[:-1])


def model(seed: int) -> SftModel:
    torch.manual_seed(seed)
    fields = dict(SHAPE)
    lm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields), attn_implementation=PACKED
    )
    return SftModel(prepared(lm, config(gradient_checkpointing=False)), config(loss_chunk=7))


def gradients(built: nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in built.parameters() if p.grad is not None]
    built.zero_grad()
    return found


@settings(max_examples=15)
@given(st.integers(0, 99), st.lists(st.integers(2, 40), min_size=2, max_size=5))
def test_a_packed_row_equals_its_samples_alone(seed: int, sizes: list[int]) -> None:
    """Loss and every gradient, so no sample sees another and positions begin again."""
    rng = random.Random(seed)
    samples = [
        Sample(tuple(rng.randrange(320) for _ in range(n)), rng.randrange(n), "") for n in sizes
    ]
    built = model(seed)
    together = built(PackedRow.make(samples))
    together.backward()
    packed = gradients(built)
    alone = sum(built(PackedRow.make([sample])) for sample in samples)
    assert isinstance(alone, torch.Tensor)
    alone.backward()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)
    for a, b in zip(packed, gradients(built), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_the_loss_is_transformers_own_on_the_completion() -> None:
    """The oracle: transformers' attention and loss over one sample with masked labels."""
    rng = random.Random(0)
    sample = Sample(tuple(rng.randrange(320) for _ in range(30)), 11, "")
    built = model(3)
    mine = built(PackedRow.make([sample])) / num_targets(sample)
    lm = built.lm
    lm.set_attn_implementation("eager")  # type: ignore[operator]
    ids = torch.tensor([sample.ids])
    labels = ids.clone()
    labels[:, :11] = -100
    torch.testing.assert_close(mine, lm(input_ids=ids, labels=labels).loss)
