"""Small machines and workloads for simulations."""

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from s1engine.bench.shapes import shape
from s1engine.plan.placement import Placement, footprint
from s1engine.plan.step_time import StepShape
from s1engine.plan.workload import PlannedBudget, PlannedRequest


def placed(**bounds: Any) -> Placement:
    """The bundled model with ample bounds, except those in ``bounds``."""
    nano = shape("nano")
    usual: dict[str, Any] = {
        "footprint": footprint(nano, nano.torch_dtype),
        "num_blocks": 1000,
        "block_size": 4,
        "max_model_len": 400,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "enable_prefix_caching": False,
        "run_ahead": 1,
        "max_run_s": 1e9,
    }
    return Placement(**(usual | bounds))


@dataclass(frozen=True)
class LinearTimeModel:
    """Seconds for each step, token, and cached token read."""

    fixed: float = 1.0
    token: float = 0.1
    context: float = 0.001

    def seconds(self, step: StepShape) -> float:
        return self.fixed + self.token * step.tokens + self.context * step.decode_context


@st.composite
def request_lists(draw: st.DrawFn, thinking: bool = True, most: int = 12) -> list[PlannedRequest]:
    """Requests by arrival time, the first at 0."""
    at, found = 0.0, []
    for _ in range(draw(st.integers(1, most))):
        found.append(
            PlannedRequest(
                at,
                draw(st.integers(1, 40)),
                draw(st.integers(1, 20)),
                draw(st.none() | st.integers(0, 30)) if thinking else None,
            )
        )
        at += draw(st.sampled_from([0.0, 0.3, 2.0, 40.0]))
    return found


budgets = st.builds(
    PlannedBudget,
    max_thinking=st.none() | st.integers(0, 40),
    num_waits=st.integers(0, 2),
    wait_thinking=st.integers(1, 10),
    wait_len=st.integers(1, 2),
)
