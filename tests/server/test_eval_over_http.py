"""A sweep over HTTP against this server equals one in this process."""

from s1engine.engine.llm import LLM
from s1engine.eval.backend import Backend
from s1engine.eval.engine_backend import EngineBackend
from s1engine.eval.http_backend import HttpBackend, HttpOptions
from s1engine.eval.method_registry import SweepOptions, build_methods
from s1engine.eval.tasks import arithmetic_questions
from tests.server.conftest import KEY, Served

METHODS = ["budget-forcing", "budget-forcing-checkpoints", "majority-voting"]


def answers(backend: Backend) -> dict[object, object]:
    options = SweepOptions(budgets=(4, 40), num_waits=(1,), samples=(2,), max_tokens=200)
    asked = arithmetic_questions(5, 4)
    found: dict[object, object] = {}
    for method in build_methods(METHODS, options):
        for answer in method.answer(asked, backend, frozenset()):
            assert answer.error is None
            figures = [
                (s.text, s.thinking_tokens, s.forced_tokens, s.waits_used, s.end_reason)
                for s in answer.samples
            ]
            extracted = answer.choice.extracted if answer.choice else None
            found[answer.settings, answer.question.id] = extracted, figures
    return found


def test_over_http_is_in_process(served: Served, llm: LLM) -> None:
    options = HttpOptions(base_url=f"{served.url}/v1", api_key=KEY, concurrency=4)
    backend = HttpBackend(options)
    assert backend.name == "s1-nano"
    got = answers(backend)
    backend.close()
    assert got == answers(EngineBackend(llm)) and len(got) == 4 * (2 + 2 + 2)
