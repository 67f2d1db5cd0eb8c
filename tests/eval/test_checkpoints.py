"""A sweep from one trace equals separate runs, for a fraction of the tokens."""

import pytest

from s1engine.engine.llm import LLM
from s1engine.errors import RequestError
from s1engine.eval.engine_backend import EngineBackend
from s1engine.eval.method_registry import SweepOptions, build_methods
from s1engine.eval.methods import RunAnswer
from s1engine.eval.report import sweep_seconds
from s1engine.eval.tasks import arithmetic_questions
from tests.eval.scripted import ScriptedBackend, questions, sample

BUDGETS = (24, 0, 96, 8)
NO_TRACES: frozenset[str] = frozenset()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(progress=False, dtype="float32", max_num_seqs=32)


def sweep(llm: LLM, name: str) -> dict[tuple[str, int | None, int], RunAnswer]:
    options = SweepOptions(budgets=BUDGETS, num_waits=(0, 1))
    asked = arithmetic_questions(3, 6)
    return {
        (answer.question.id, answer.settings.budget, answer.settings.num_waits): answer
        for method in build_methods([name], options)
        for answer in method.answer(asked, EngineBackend(llm), NO_TRACES)
    }


def test_one_trace_answers_like_separate_runs(llm: LLM) -> None:
    def computed() -> int:
        return llm.engine.scheduler.stats().num_computed_tokens

    llm.engine.scheduler.clear_cache()
    before = computed()
    separate = sweep(llm, "budget-forcing")
    cost = computed() - before
    llm.engine.scheduler.clear_cache()
    before = computed()
    together = sweep(llm, "budget-forcing-checkpoints")
    assert computed() - before < cost
    assert set(together) == set(separate) and len(together) == 6 * 4 * 2
    for key, answer in together.items():
        assert answer.error is None
        assert answer.choice == separate[key].choice
        assert answer.samples == separate[key].samples


def test_runs_are_in_the_order_asked_and_a_missing_answer_is_an_error() -> None:
    (method,) = build_methods(["budget-forcing-checkpoints"], SweepOptions(budgets=(8, None, 4)))
    assert [run.budget for run in method.settings] == [8, None, 4]
    backend = ScriptedBackend(lambda request: [sample("Answer: 1")])  # knows no checkpoints
    found = list(method.answer(questions(1), backend, NO_TRACES))
    errors = [(answer.settings.budget, answer.error) for answer in found]
    assert errors == [(8, "no answer at budget 8"), (None, None), (4, "no answer at budget 4")]
    (request,) = backend.asked
    assert request.params.thinking is not None
    assert request.params.thinking.max_tokens is None and request.params.thinking.checkpoints == (
        4,
        8,
    )


def test_too_many_budgets_are_refused() -> None:
    with pytest.raises(RequestError) as error:
        build_methods(["budget-forcing-checkpoints"], SweepOptions(budgets=tuple(range(80))))
    assert error.value.param == "thinking_checkpoints"


def test_the_time_of_one_trace_counts_once() -> None:
    def run(method: str, num_waits: int, wall_s: float) -> dict[str, object]:
        return {"settings": {"method": method, "num_waits": num_waits}, "wall_s": wall_s}

    together = [run("budget-forcing-checkpoints", waits, 2.0 + waits) for waits in (0, 0, 1)]
    alone = [run("budget-forcing", 0, 4.0), run("budget-forcing", 0, 5.0)]
    assert sweep_seconds([*together, *alone]) == 2.0 + 3.0 + 4.0 + 5.0
