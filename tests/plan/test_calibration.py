"""Least squares against its optimality conditions, the time model against its samples."""

from dataclasses import astuple, fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.bench.shapes import shape
from s1engine.config import EngineConfig
from s1engine.plan import calibration
from s1engine.plan.calibration import (
    KNOTS,
    LINEAR_TERMS,
    FittedTimeModel,
    fit_steps,
    non_negative_least_squares,
)
from s1engine.plan.step_time import StepShape, prefill_steps


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 6))
def test_least_squares_meets_its_optimality_conditions(seed: int, rows: int, columns: int) -> None:
    """x >= 0; the gradient is 0 at free coefficients and not positive at the others."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rows, columns)), rng.normal(size=rows)
    x = non_negative_least_squares(a, b)
    pull = a.T @ (b - a @ x)
    assert (x >= 0).all()
    assert np.abs(pull[x > 0]).max(initial=0) < 1e-7
    assert pull[x == 0].max(initial=0) < 1e-7


def steps(rng: np.random.Generator, count: int) -> list[StepShape]:
    shapes = []
    for _ in range(count):
        decodes, extend = rng.integers(0, 65), rng.choice([0, 3, 20, 90, 300, 1000])
        if decodes + extend == 0:
            continue
        context = extend + rng.integers(0, 200) * (extend > 0)
        pairs = extend * context - extend * (extend - 1) // 2
        read = decodes * rng.integers(1, 500)
        shapes.append(StepShape(decodes + extend, decodes + (extend > 0), read, context, pairs,
                          rng.integers(0, 3)))  # fmt: skip
    return shapes


costs = st.lists(st.floats(0, 1e-3), min_size=len(LINEAR_TERMS), max_size=len(LINEAR_TERMS))
slopes = st.lists(st.floats(0, 1e-4), min_size=len(KNOTS) - 1, max_size=len(KNOTS) - 1)


@settings(max_examples=30)
@given(st.integers(0, 2**32), costs, slopes, st.floats(1e-4, 1e-2))
def test_a_machine_of_this_form_is_recovered(
    seed: int, each: list[float], slopes: list[float], fixed: float
) -> None:
    rises = np.concatenate([[0.0], np.cumsum(np.array(slopes) * np.diff(KNOTS))])
    machine = FittedTimeModel(tuple((fixed + rises).tolist()), tuple(each))
    seen = steps(np.random.default_rng(seed), 60)
    found = fit_steps(seen, [machine.seconds(step) for step in seen])
    for step in seen:
        assert found.seconds(step) == pytest.approx(machine.seconds(step), rel=1e-3)


@given(st.integers(0, 2**32), st.floats(0, 0.3))
def test_more_work_is_never_quicker(seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    seen = steps(rng, 30)
    times = [1e-3 + 1e-5 * s.tokens + 1e-7 * s.extend_pairs for s in seen]
    found = fit_steps(seen, [t * (1 + noise * rng.uniform(-1, 1)) for t in times])
    for step in seen:
        for field in fields(StepShape):
            more = replace(step, **{field.name: getattr(step, field.name) + 7})
            assert found.seconds(more) >= found.seconds(step)


@given(st.integers(1, 5000), st.integers(1, 600))
def test_chunks_make_up_the_prompt(prompt: int, chunk: int) -> None:
    found = prefill_steps(prompt, chunk)
    assert sum(step.tokens for step in found) == prompt
    pairs = sum(s.extend_pairs or s.decode_context for s in found)
    assert pairs == prompt * (prompt + 1) // 2
    assert [s.samples for s in found] == [0] * (len(found) - 1) + [1]


def test_calibration_measures_its_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "DECODES", ((1, 8), (3, 8), (9, 8), (1, 5000)))
    monkeypatch.setattr(calibration, "EXTENDS", ((2, 16), (1, 5000)))
    monkeypatch.setattr(calibration, "BESIDE", (0, 3))
    monkeypatch.setattr(calibration, "DECODE_STEPS", 5)
    engine = calibration.calibration_engine(EngineConfig(max_num_seqs=8), shape("nano"))
    points = calibration.measure_steps(engine)
    context = 8 + 2.5  # four steps: the prefill sampled the first token
    assert [astuple(point.step) for point in points] == [
        (1, 1, context, 0, 0, 0),
        (3, 3, 3 * context, 0, 0, 0),
        (32, 2, 0, 32, 2 * 16 * 17 / 2, 2),
        (35, 5, 3 * 65, 32, 2 * 16 * 17 / 2, 2),
    ]
    assert all(point.seconds > 0 for point in points)
    model, error = calibration.fit_calibration([points, points])
    assert error >= 0 and all(model.seconds(point.step) > 0 for point in points)
