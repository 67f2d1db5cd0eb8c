"""Elastic budgets: while requests wait, thinking is cut towards the floor and reports it."""

from typing import Any

from s1engine.engine.llm import LLM
from s1engine.sampling_params import SamplingParams, ThinkingBudget

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}]
FLOOR = 20


def params(**thinking: Any) -> SamplingParams:
    budget = ThinkingBudget(max_tokens=200, num_waits=1000, wait_text="", **thinking)
    return SamplingParams(temperature=0, max_tokens=400, thinking=budget)


def test_budgets_shrink_only_while_requests_wait() -> None:
    llm = LLM(
        progress=False,
        dtype="float32",
        max_num_seqs=2,
        max_num_batched_tokens=256,
        overload_thinking_floor=FLOOR,
    )
    calm = llm.chat([CHAT, CHAT], params(), progress=False)
    for output in calm:
        used = output.outputs[0].thinking
        assert used is not None and (used.tokens, used.end_reason) == (200, "budget")
    outputs = llm.chat([CHAT] * 8, [*[params()] * 7, params(min_tokens=60)], progress=False)
    used = [output.outputs[0].thinking for output in outputs]
    for one in used[:2]:  # six requests waited for two rows: cut to the floor
        assert one is not None and one.end_reason == "overload"
        assert one.budget == FLOOR <= one.tokens <= FLOOR + 1
    assert all(one is not None and one.tokens >= FLOOR for one in used)
    last = used[-1]
    assert last is not None and last.tokens >= 60
    assert all(output.outputs[0].text for output in outputs)
