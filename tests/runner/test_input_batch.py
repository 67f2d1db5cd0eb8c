"""The arrays of a step."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.bench.bare_engine import BareEngine, Job
from tests.runner.test_delayed_copies import CONFIG, DECODER, MODEL


def test_views_of_a_size_stay_valid() -> None:
    """So that a graph may read them."""
    batch = BareEngine(CONFIG, MODEL, DECODER).runner.batch
    sizes = batch.fill_dummy([2, 1], 0, 16)
    first = batch.inputs(sizes)
    batch.fill_dummy([1, 2], 0, 16)
    assert batch.inputs(sizes) is first
    assert first.attention.cu_seqlens_q.tolist() == [0, 1, 3]


@settings(max_examples=10)
@given(
    jobs=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(0, 4)), min_size=2, max_size=5
    )
)
def test_rows_of_one_token_come_first(jobs: list[tuple[int, int, int]]) -> None:
    """However long the prompts are, and whenever they arrive."""
    engine = BareEngine(CONFIG, MODEL, DECODER)
    execute, mixed = engine.runner.execute, []

    def watched(step: Any) -> Any:
        inputs = engine.runner.batch.inputs().attention
        counts = inputs.cu_seqlens_q.diff().tolist()
        assert inputs.num_decode_rows == counts.count(1)
        assert counts[: inputs.num_decode_rows] == [1] * inputs.num_decode_rows
        mixed.append(0 < inputs.num_decode_rows < len(counts))
        return execute(step)

    engine.runner.execute = watched  # type: ignore[method-assign]
    for length, new, pause in jobs:
        engine.add(Job(prompt=[10 + i % 200 for i in range(length)], max_new=new))
        for _ in range(pause):
            engine.step()
    engine.run_jobs()
