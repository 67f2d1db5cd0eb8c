"""Sampling: the generator against published vectors, the rules against slow pure Python, the draws
against their exact distribution."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine.ops import Penalties, SamplingMetadata
from s1engine.ops.torch_sampling import (
    best_of_shard,
    best_of_shards,
    exponential_noise,
    kept_tokens,
    philox,
    sample,
)

WORD = 0xFFFFFFFF


def make_sampling(rows: int, **fields: Any) -> SamplingMetadata:
    """Metadata of ``rows`` rows; a field is one value for all rows or a list or tensor of them."""

    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        value = torch.as_tensor(fields.pop(name, default), dtype=dtype)
        return value.expand(rows).clone()

    values = {
        "temperature": column("temperature", 1.0, torch.float32),
        "top_k": column("top_k", 0, torch.int32),
        "top_p": column("top_p", 1.0, torch.float32),
        "min_p": column("min_p", 0.0, torch.float32),
        "seeds": column("seeds", 0, torch.int64),
        "positions": column("positions", 0, torch.int64),
    }
    neutral = (values["top_k"] == 0) & (values["top_p"] == 1) & (values["min_p"] == 0)
    return SamplingMetadata(
        **values,
        all_greedy=bool((values["temperature"] == 0).all()),
        filtered=bool((~neutral).any()),
        **fields,
    )


def make_penalties(rows: int, vocab: int, **fields: Any) -> Penalties:
    return Penalties(
        repetition=torch.as_tensor(fields.get("repetition", 1.0)).expand(rows).clone(),
        presence=torch.as_tensor(fields.get("presence", 0.0)).expand(rows).clone(),
        frequency=torch.as_tensor(fields.get("frequency", 0.0)).expand(rows).clone(),
        in_prompt=fields.get("in_prompt", torch.zeros(rows, vocab, dtype=torch.bool)),
        output_counts=fields.get("output_counts", torch.zeros(rows, vocab, dtype=torch.int32)),
    )


def philox_reference(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & WORD,
            (first >> 32) ^ counter[3] ^ key[1],
            first & WORD,
        ]
        key = [(key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD]
    return counter


def noise_reference(seed: int, position: int, token: int) -> np.float32:
    """The exponential of one token, one float32 rounding at a time."""
    seed, position = seed % 2**64, position % 2**64
    counter = [token // 4, position & WORD, position >> 32, 0]
    word = philox_reference(counter, [seed & WORD, seed >> 32])[token % 4]
    uniform = (np.float32(word) + np.float32(0.5)) * np.float32(2.0**-32)
    return -np.log1p(-min(uniform, np.float32(1 - 2.0**-24)))


def kept_reference(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Top-k, top-p and min-p one token at a time, in double precision."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if top_k > 0:
        order = order[:top_k]
    weights = [math.exp(logits[token] - logits[order[0]]) for token in order]
    kept, mass = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        if kept and top_p < 1 and mass >= top_p * sum(weights):
            break
        mass += weight
        if weight >= min_p:
            kept.append(token)
    return set(kept)


VECTORS = [  # Random123's known answers for philox4x32-10: counter, key, result
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    words = philox((c0, c1, c2, c3), (torch.tensor(key[0]), torch.tensor(key[1])))
    assert [int(word) for word in words] == expected
    assert philox_reference(counter, key) == expected


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**40),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    logits=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=41),
)
def test_sample_is_the_formula(
    seed: int, position: int, temperature: float, logits: list[float]
) -> None:
    scores = [
        np.float32(logit) / np.float32(temperature) - np.log(noise_reference(seed, position, token))
        for token, logit in enumerate(logits)
    ]
    best, *others = sorted(scores, reverse=True)
    assume(not others or best - others[0] > 1e-5)  # where a last bit could decide
    meta = make_sampling(1, temperature=temperature, seeds=seed, positions=position)
    assert int(sample(torch.tensor([logits]), meta)) == scores.index(best)


def test_noise_is_finite_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tuple(torch.tensor([[word]]) for word in (0, 1, WORD - 1, WORD))
    monkeypatch.setattr("s1engine.ops.torch_sampling.philox", lambda counter, key: words)
    zero = torch.zeros(1, dtype=torch.int64)
    noise = exponential_noise(zero, zero, 4)[0]
    expected = [0.5 * 2**-32, 1.5 * 2**-32, 24 * math.log(2), 24 * math.log(2)]
    torch.testing.assert_close(noise, torch.tensor(expected), rtol=1e-6, atol=0)


def chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    """The statistic over the tokens that have a probability; the others must not be drawn."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities.double() * len(tokens)
    return float(((counts - expected)[possible] ** 2 / expected[possible]).sum())


LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.5, 3.0, -2.0, 1.0, 0.2, 2.5, -0.3, 0.7, 1.1])
DRAWS = 20_000
CRITICAL_12 = 39.1  # chi-square with 12 degrees of freedom exceeds this once in 10,000 tries


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("varied", ["positions", "seeds"])
def test_draws_follow_the_softmax(temperature: float, varied: str) -> None:
    meta = make_sampling(DRAWS, temperature=temperature, **{varied: torch.arange(DRAWS)})
    tokens = sample(LOGITS.repeat(DRAWS, 1), meta)
    assert chi_square(tokens, (LOGITS / temperature).softmax(0)) < CRITICAL_12


def test_filtered_draws_follow_what_is_left() -> None:
    meta = make_sampling(
        DRAWS, top_k=6, top_p=0.9, min_p=0.2, positions=torch.arange(DRAWS), seeds=7
    )
    kept = kept_reference(LOGITS.tolist(), 6, 0.9, 0.2)
    assert len(kept) == 4  # top-p drops the sixth, min-p the fifth
    target = torch.full_like(LOGITS, -math.inf)
    target[list(kept)] = LOGITS[list(kept)]
    assert chi_square(sample(LOGITS.repeat(DRAWS, 1), meta), target.softmax(0)) < CRITICAL_12


def test_consecutive_draws_are_independent() -> None:
    logits = torch.tensor([0.0, 1.0, 0.5])
    meta = make_sampling(DRAWS, positions=torch.arange(DRAWS), seeds=2**63 - 1)
    tokens = sample(logits.repeat(DRAWS, 1), meta)
    pairs = tokens[0::2] * 3 + tokens[1::2]
    expected = logits.softmax(0)
    assert chi_square(pairs, torch.outer(expected, expected).flatten()) < 31.8  # 8 degrees


@settings(deadline=None, max_examples=300)
@given(
    weights=st.lists(st.integers(1, 12), min_size=1, max_size=24),
    top_k=st.integers(0, 26),
    top_p=st.one_of(st.just(1.0), st.integers(1, 199).map(lambda n: n / 200)),
    min_p=st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.99]),
)
def test_filters_keep_what_the_reference_keeps(
    weights: list[int], top_k: int, top_p: float, min_p: float
) -> None:
    ranked = sorted(weights, reverse=True)[: top_k or None]
    sums = np.cumsum(ranked) / sum(ranked)
    assume(top_p == 1 or np.abs(sums - top_p).min() > 1e-5)  # where rounding could decide
    assume(all(abs(weight / ranked[0] - min_p) > 1e-5 for weight in ranked))
    logits = [math.log(weight) for weight in weights]  # small integers: ties are common
    meta = make_sampling(1, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = kept_tokens(torch.tensor([logits]), *_filters(meta))
    assert set(kept[0].nonzero().flatten().tolist()) == kept_reference(logits, top_k, top_p, min_p)


def test_top_p_is_of_what_top_k_left_and_ends_where_it_is_reached() -> None:
    meta = make_sampling(1, top_k=4, top_p=0.5)
    kept = kept_tokens(torch.zeros(1, 16), *_filters(meta))
    assert kept[0].nonzero().flatten().tolist() == [0, 1]


def test_neutral_filters_keep_every_token() -> None:
    scaled = torch.tensor([[50.0, 0.0, -60.0, -80.0]])  # the last ones have no probability left
    assert kept_tokens(scaled, *_filters(make_sampling(1))).all()


def test_top_p_of_nearly_nothing_keeps_the_likeliest() -> None:
    meta = make_sampling(2, top_p=1e-9)
    kept = kept_tokens(torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 3.0]]), *_filters(meta))
    assert kept.tolist() == [[False, True, False], [True, False, False]]


def _filters(meta: SamplingMetadata) -> tuple[Tensor, Tensor, Tensor]:
    return meta.top_k, meta.top_p, meta.min_p


def random_rows(rows: int, vocab: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Logits and fields of rows that differ in every rule."""
    generator = torch.Generator().manual_seed(seed)

    def pick(values: list[float]) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]

    fields = {
        "temperature": pick([0.0, 0.5, 1.0, 2.0]),
        "top_k": pick([0, 1, 5]),
        "top_p": pick([0.3, 0.9, 1.0]),
        "min_p": pick([0.0, 0.1]),
        "seeds": torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        "positions": torch.randint(0, 10_000, (rows,), generator=generator),
        "penalties": make_penalties(
            rows,
            vocab,
            repetition=pick([1.0, 1.3, 0.8]),
            presence=pick([0.0, 0.7]),
            frequency=pick([0.0, 0.4]),
            in_prompt=torch.rand(rows, vocab, generator=generator) < 0.3,
            output_counts=torch.randint(0, 3, (rows, vocab), generator=generator).int(),
        ),
        "bias": (torch.arange(rows), torch.arange(rows) % vocab, torch.full((rows,), 3.0)),
        "banned": (torch.arange(rows), torch.arange(1, rows + 1) % vocab),
    }
    return torch.randn(rows, vocab, generator=generator) * 3, fields


def one_row(fields: dict[str, Any], row: int) -> dict[str, Any]:
    alone = {name: fields[name][row : row + 1] for name in fields if torch.is_tensor(fields[name])}
    penalties = fields["penalties"]
    alone["penalties"] = Penalties(
        **{name: getattr(penalties, name)[row : row + 1] for name in Penalties.__slots__}
    )
    for name in ("bias", "banned"):
        own = fields[name][0] == row
        alone[name] = tuple(part[own] for part in fields[name])
        alone[name] = (torch.zeros_like(alone[name][0]), *alone[name][1:])
    return alone


def test_batched_is_alone() -> None:
    logits, fields = random_rows(64, 37, seed=3)
    together = sample(logits.clone(), make_sampling(64, **fields))
    for row in range(64):
        alone = sample(logits[row : row + 1].clone(), make_sampling(1, **one_row(fields, row)))
        assert int(alone) == int(together[row])
    assert len(set(together.tolist())) > 10


def test_a_large_batch_is_drawn_in_pieces_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, fields = random_rows(50, 37, seed=4)
    whole = sample(logits.clone(), make_sampling(50, **fields))
    monkeypatch.setattr("s1engine.ops.torch_sampling._DRAW_ELEMENTS", 37 * 7)
    assert torch.equal(sample(logits.clone(), make_sampling(50, **fields)), whole)


def test_noise_follows_the_seed_and_the_position() -> None:
    logits = torch.zeros(1, 1000)
    base = int(sample(logits.clone(), make_sampling(1, seeds=5, positions=9)))
    assert int(sample(logits.clone(), make_sampling(1, seeds=5, positions=9))) == base
    for seed, position in ((6, 9), (5 + 2**32, 9), (5, 10), (5, 9 + 2**32), (9, 5)):
        meta = make_sampling(1, seeds=seed, positions=position)
        assert int(sample(logits.clone(), meta)) != base


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 4.0, 4.0], [-2.0, -3.0, -2.0]])
    assert sample(logits.clone(), make_sampling(2, temperature=0.0)).tolist() == [1, 0]
    mixed = make_sampling(2, temperature=[0.0, 1.0])
    assert int(sample(logits.clone(), mixed)[0]) == 1


def test_a_low_temperature_is_nearly_greedy_and_overflows_nowhere() -> None:
    logits = torch.tensor([[100.0, 101.0, -500.0]]).repeat(100, 1)
    for temperature in (1e-38, 1e-3):
        meta = make_sampling(100, temperature=temperature, top_p=0.9, seeds=torch.arange(100))
        assert sample(logits.clone(), meta).tolist() == [1] * 100


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_is_never_sampled(temperature: float) -> None:
    logits = torch.tensor([9.0, 8.0, 0.0, -1.0]).repeat(2000, 1)
    rows = torch.arange(2000).repeat_interleave(2)
    meta = make_sampling(
        2000,
        temperature=temperature,
        top_k=3,
        seeds=torch.arange(2000),
        bias=(rows, torch.zeros_like(rows), torch.full((4000,), 100.0)),
        banned=(rows, torch.tensor([0, 1]).repeat(2000)),
    )
    assert set(sample(logits, meta).tolist()) == ({2} if temperature == 0 else {2, 3})


def test_bias_and_penalties_are_applied_in_order() -> None:
    """Bias first, then repetition by sign, then frequency and presence."""
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5, -1.0]])
    meta = make_sampling(
        1,
        temperature=0.0,
        bias=(torch.tensor([0, 0]), torch.tensor([4, 4]), torch.tensor([2.0, 1.5])),
        penalties=make_penalties(
            1,
            5,
            repetition=2.0,
            presence=0.25,
            frequency=0.125,
            in_prompt=torch.tensor([[True, True, False, False, False]]),
            output_counts=torch.tensor([[0, 0, 3, 0, 1]], dtype=torch.int32),
        ),
    )
    sample(logits, meta)
    expected = [2.0 / 2, -2.0 * 2, 1.0 / 2 - 0.25 - 3 * 0.125, 0.5, 2.5 / 2 - 0.25 - 0.125]
    assert logits[0].tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0])
def test_a_row_of_nan_harms_nobody(temperature: float) -> None:
    logits, fields = random_rows(8, 37, seed=5)
    fields["temperature"][3] = temperature
    expected = sample(logits.clone(), make_sampling(8, **fields))
    logits[3] = math.nan
    tokens = sample(logits.clone(), make_sampling(8, **fields))
    others = torch.arange(8) != 3
    assert torch.equal(tokens[others], expected[others])
    assert 0 <= int(tokens[3]) < 37
    assert int(tokens[3]) != 4, "banned in this row"


@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0])
def test_nan_and_infinite_logits_are_ordered(temperature: float) -> None:
    meta = make_sampling(3, temperature=temperature, seeds=torch.arange(3))
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[nan, 1.0, nan], [1.0, 2.0, inf], [-inf, nan, -300.0]])
    assert sample(logits, meta).tolist() == [1, 2, 2]


def test_an_infinite_logit_survives_a_low_temperature_and_filters() -> None:
    meta = make_sampling(1, temperature=1e-38, top_p=0.9, min_p=0.1)
    assert int(sample(torch.tensor([[1.0, math.inf]]), meta)) == 1


def test_a_row_without_any_number_still_avoids_what_is_banned() -> None:
    rows = torch.arange(200)
    for temperature in (0.0, 1e-9, 1.0):
        meta = make_sampling(
            200,
            temperature=temperature,
            top_p=0.9,
            seeds=rows,
            banned=(rows, torch.zeros_like(rows)),
        )
        assert 0 not in sample(torch.full((200, 5), math.nan), meta).tolist()


@settings(max_examples=30)
@given(
    size=st.integers(1, 4), rows=st.integers(1, 5), seed=st.integers(0, 999),
    coarse=st.sampled_from([1, 1000]), data=st.data(),
)  # fmt: skip
def test_the_best_of_all_shards_is_the_sample(
    size: int, rows: int, seed: int, coarse: int, data: st.DataObject
) -> None:
    """Coarse logits are equal across shards: the lowest id among equals wins."""
    generator = torch.Generator().manual_seed(seed)
    width = 4 * data.draw(st.integers(1, 6))
    vocab = data.draw(st.integers(width * (size - 1) + 1, width * size))
    logits = torch.randint(-2 * coarse, 2 * coarse, (rows, vocab), generator=generator) / coarse
    logits[:, :2] = torch.tensor([math.nan, math.inf])[: min(2, vocab)]
    banned = torch.arange(rows) % rows, torch.randint(0, vocab, (rows,), generator=generator)
    meta = make_sampling(
        rows,
        temperature=torch.tensor([0.0, 0.7, 3.0])[torch.arange(rows) % 3],
        seeds=seed + torch.arange(rows) * 2**40,
        positions=torch.arange(rows) + 2**33,
        banned=banned if seed % 2 else None,
    )
    candidates = [
        best_of_shard(logits[:, first : first + width].clone(), meta, first)
        for first in range(0, vocab, width)
    ]
    got = best_of_shards(torch.cat(candidates, dim=1))
    assert got.tolist() == sample(logits.clone(), meta).tolist()
