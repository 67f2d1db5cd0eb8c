"""Step costs: an ascending line through noisy measurements."""

import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.runner import step_profile
from s1engine.runner.step_profile import profile_steps


def dummy_run_of(cost: Callable[[int], float], clock: list[float]) -> Callable[..., object]:
    def dummy_run(tokens: int) -> Callable[[], None]:
        def step() -> None:
            clock[0] += cost(tokens)

        return step

    return dummy_run


def measured(cost: Callable[[int], float], most: int) -> list[tuple[int, float]]:
    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_profile.time, "perf_counter", lambda: clock[0])
        return profile_steps(dummy_run_of(cost, clock), most)  # type: ignore[arg-type]


@settings(max_examples=30)
@given(st.lists(st.floats(0.5, 2.0), min_size=40, max_size=40), st.integers(1, 600))
def test_points_ascend_and_never_exceed_what_was_measured(noise: list[float], most: int) -> None:
    points = measured(lambda n: noise[n % 40], most)
    sizes, costs = zip(*points, strict=True)
    assert sizes[0] == 1 and sizes[-1] <= most
    assert list(sizes) == sorted(set(sizes)) and list(costs) == sorted(costs)
    assert all(cost <= noise[n % 40] + 1e-9 for n, cost in points)


def test_it_stops_where_larger_steps_gain_nothing() -> None:
    assert [n for n, _ in measured(lambda n: 1.0, 24)] == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert [n for n, _ in measured(lambda n: float(n), 512)] == [1, 2]
    assert measured(lambda n: max(n / 8, 1.0), 512)[-1] == (16, 2.0)


def test_time_is_real() -> None:
    (point,) = profile_steps(lambda tokens: lambda: time.sleep(0.002), 1)
    assert point[0] == 1 and point[1] >= 0.002
