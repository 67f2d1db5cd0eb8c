"""Methods on a scripted backend: their requests, tries, and chosen answers."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.errors import RequestError
from s1engine.eval.backend import EvalRequest, EvalSample
from s1engine.eval.method_registry import METHODS, SweepOptions, build_methods
from s1engine.eval.methods import Method, RunAnswer, first_sample, majority_vote, most_confident
from s1engine.eval.tasks import Question
from tests.eval.scripted import ScriptedBackend, questions, sample
from tests.shared_data import shared_file

NO_TRACES: frozenset[str] = frozenset()


def answers(method: Method, backend: ScriptedBackend, count: int = 3) -> list[RunAnswer]:
    found = list(method.answer(questions(count), backend, NO_TRACES))
    return sorted(found, key=lambda answer: answer.question.id)


def right(request: EvalRequest) -> list[EvalSample]:
    return [sample(f"Answer: {request.key}")] * request.params.n


def one(name: str, **options: object) -> Method:
    (method,) = build_methods([name], SweepOptions(**options))  # type: ignore[arg-type]
    return method


# --- requests ---


def asked(name: str, **options: object) -> list[EvalRequest]:
    """The first request of every run."""
    found = []
    for method in build_methods([name], SweepOptions(**options)):  # type: ignore[arg-type]
        backend = ScriptedBackend(right)
        answers(method, backend, 1)
        found.append(backend.asked[0])
    return found


def limits(requests: Sequence[EvalRequest]) -> list[int | None]:
    return [
        request.params.thinking.max_tokens if request.params.thinking else None
        for request in requests
    ]


def test_budget_forcing_runs_budgets_within_waits() -> None:
    requests = asked("budget-forcing", budgets=(0, None), num_waits=(0, 2), wait_text="Hmm")
    assert limits(requests) == [0, None, 0, None]
    assert requests[1].params.thinking is None
    budget = requests[3].params.thinking
    assert budget is not None and (budget.num_waits, budget.wait_text) == (2, "Hmm")
    assert {request.params.temperature for request in requests} == {0}
    assert {request.prompt for request in requests} == {"what is 0?"}


def test_conditional_methods_only_ask_and_their_forced_forms_also_cut() -> None:
    for suffix, forced in (("", False), ("-forced", True)):
        tokens = asked(f"token-conditional{suffix}", budgets=(64,))
        assert tokens[0].prompt == "what is 0?\n\nThink for up to 64 tokens."
        steps = asked(f"step-conditional{suffix}", steps=(16,))
        assert steps[0].prompt == "what is 0?\n\nThink for up to 16 steps."
        assert limits([*tokens, *steps]) == ([64, 1600] if forced else [None, None])
    free, short, long = asked("class-conditional-forced", budgets=(64,))
    assert free.prompt == "what is 0?" and limits([free, short, long]) == [64] * 3
    assert "short amount" in short.prompt and "long amount" in long.prompt


def test_prompts_are_those_of_s1() -> None:
    import json

    facts = json.loads(shared_file("tokenizer/s1_chat_format.json").read_text())
    _, short, long = asked("class-conditional")
    assert short.prompt.endswith(f"\n\n{facts['class_conditional_short']}")
    assert long.prompt.endswith(f"\n\n{facts['class_conditional_long']}")
    (tokens,) = asked("token-conditional", budgets=(8,))
    assert tokens.prompt.endswith(facts["token_conditional_suffix"].format(n=8))
    (steps,) = asked("step-conditional", steps=(8,))
    assert steps.prompt.endswith(facts["step_conditional_suffix"].format(n=8))


def test_all_questions_are_in_flight_at_once() -> None:
    for name in METHODS:
        options = {"budgets": (64,)} if "budgets" in METHODS[name].options else {}
        for method in build_methods([name], SweepOptions(**options)):  # type: ignore[arg-type]
            backend = ScriptedBackend(right)
            assert all(a.choice and a.choice.extracted for a in answers(method, backend, 9))
            assert backend.most_waiting == 9


def test_seeds_depend_on_the_question_not_on_its_order() -> None:
    method = one("majority-voting", samples=(2,))
    whole, part = ScriptedBackend(right), ScriptedBackend(right)
    list(method.answer(questions(4), whole, NO_TRACES))
    list(method.answer(questions(4)[2:], part, NO_TRACES))
    seeds = [request.params.seed for request in whole.asked]
    assert len(set(seeds)) == 4 and [request.params.seed for request in part.asked] == seeds[2:]


# --- rejection sampling ---


def test_rejection_tries_until_the_thinking_is_short_enough() -> None:
    lengths = {0: [3], 1: [20, 16, 15], 2: [20] * 9}

    def script(request: EvalRequest) -> list[EvalSample]:
        thinking = lengths[request.key].pop(0)
        return [sample(f"Answer: {request.key}", thinking, thinking + 2, end_reason="natural")]

    backend = ScriptedBackend(script)
    method = one("rejection-sampling", budgets=(16,), max_tries=4)
    found = answers(method, backend)
    assert [answer.tries for answer in found] == [1, 3, 4]
    assert [a.choice.extracted if a.choice else None for a in found] == ["0", "1", None]
    assert [len(answer.samples) for answer in found] == [1, 3, 4]
    assert (
        len({(request.key, request.params.seed) for request in backend.asked}) == 8
    )  # never the same again
    assert {request.params.temperature for request in backend.asked} == {1}


def test_thinking_that_was_cut_is_rejected_and_a_failure_ends_the_tries() -> None:
    def script(request: EvalRequest) -> list[EvalSample]:
        if request.key == 1:
            raise RuntimeError("server is down")
        return [sample("Answer: 0", 3, end_reason="length")]

    method = one("rejection-sampling", budgets=(16,), max_tries=2)
    cut, failed = answers(method, ScriptedBackend(script), 2)
    assert cut.choice is None and cut.tries == 2 and cut.error is None
    assert failed.error == "server is down" and failed.samples == ()


# --- choosing ---


def test_the_majority_counts_equal_answers_and_favours_the_first() -> None:
    question = Question("q", "?", "1")
    texts = ["none", r"\boxed{1/2}", "Answer: 3", r"\boxed{0.5}", "Answer: 3"]
    choice = majority_vote(question, [sample(text) for text in texts])
    assert (choice.extracted, choice.votes) == ("1/2", 2)
    assert majority_vote(question, [sample("none")]).extracted is None


def test_a_choice_is_counted_by_its_letter() -> None:
    question = Question("q", "?", "B", kind="choice")
    texts = ["Answer: A) 3 eV", "Answer: (B)", r"\boxed{\text{B}}"]
    assert majority_vote(question, [sample(text) for text in texts]).votes == 2


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_the_majority_is_the_mode_seen_first(votes: list[int]) -> None:
    choice = majority_vote(Question("q", "?", "1"), [sample(f"Answer: {vote}") for vote in votes])
    counts = {vote: votes.count(vote) for vote in votes}  # in the order seen
    assert choice.extracted == str(max(counts, key=lambda vote: counts[vote]))
    assert choice.votes == max(counts.values())


def test_the_most_confident_answer_wins_over_silence() -> None:
    question = Question("q", "?", "1")
    samples = [
        sample("Answer: 1", mean_logprob=-2.0),
        sample("nothing", mean_logprob=-0.1),
        sample("Answer: 2", mean_logprob=-1.0),
    ]
    assert most_confident(question, samples).extracted == "2"
    assert most_confident(question, samples[1:2]).extracted is None
    assert first_sample(question, samples).extracted == "1"


# --- options ---


@pytest.mark.parametrize(
    ("names", "options", "param"),
    [
        (["tree-search"], {}, "method"),
        (["budget-forcing", "budget-forcing"], {}, "method"),
        (["budget-forcing"], {"budgets": (2**24 + 1,)}, "budgets"),
        (["budget-forcing"], {"budgets": (-1,)}, "budgets"),
        (["budget-forcing"], {"budgets": (8, 8)}, "budgets"),
        (["budget-forcing"], {"num_waits": (1025,)}, "num_waits"),
        (["budget-forcing"], {"steps": (8,)}, "steps"),
        (["token-conditional"], {"num_waits": (1,)}, "num_waits"),
        (["class-conditional"], {"budgets": (8,)}, "budgets"),
        (["step-conditional"], {"steps": (0,)}, "steps"),
        (["majority-voting"], {"samples": (129,)}, "samples"),
        (["majority-voting"], {"max_tries": 2}, "max_tries"),
        (["rejection-sampling"], {"max_tries": 0}, "max_tries"),
        (["rejection-sampling"], {"budgets": (0,)}, "budgets"),
        (["budget-forcing"], {"temperature": -1.0}, "temperature"),
        (["budget-forcing"], {"max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_options_are_refused(names: list[str], options: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as error:
        build_methods(names, SweepOptions(**options))  # type: ignore[arg-type]
    assert error.value.param == param


def test_an_option_may_apply_to_one_of_several_methods() -> None:
    methods = build_methods(
        ["budget-forcing", "majority-voting"],
        SweepOptions(budgets=(8,), num_waits=(1,), samples=(2, 4)),
    )
    found = [(m.settings[0].method, m.settings[0].limit) for m in methods]
    assert found == [("budget-forcing", 8), ("majority-voting", 16), ("majority-voting", 32)]
