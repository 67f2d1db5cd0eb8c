"""Pinned prefixes and warm-up: found whatever else ran, refused where they do not fit, released in
every way, and without effect on any token."""

import gc
from typing import Any

import pytest

from s1engine.engine import prefix
from s1engine.engine.llm import LLM
from s1engine.engine.request_stream import RequestStream
from s1engine.errors import RequestError
from s1engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SYSTEM: list[Any] = [{"role": "system", "content": "You add small numbers. " * 12}]


def prompt(seed: int, size: int) -> list[int]:
    return [10 + (seed * 31 + i * 7) % 300 for i in range(size)]


def num_pinned(llm: LLM) -> int:
    return llm.call(lambda engine: engine.scheduler.stats().num_pinned_blocks)


def check(llm: LLM) -> None:
    llm.call(lambda engine: engine.scheduler.check_integrity())


def test_a_pinned_prefix_is_found_after_the_cache_was_filled(llm: LLM, tight: LLM) -> None:
    head = prompt(0, 100)
    with tight.prefill(head) as pinned:
        assert pinned.token_ids == head[:96] and pinned.num_tokens == 96
        assert tight.stats().num_pinned_blocks == 6
        tight.generate([prompt(seed, 150) for seed in range(1, 7)], GREEDY)
        outputs = tight.generate([[*head, 20], prompt(9, 60)], GREEDY)
        salted = tight.generate([*head, 20], GREEDY, cache_salt="other")[0]
        check(tight)
    assert num_pinned(tight) == 0
    llm.call(lambda engine: engine.scheduler.clear_cache())
    cold = llm.generate([[*head, 20], prompt(9, 60)], GREEDY)
    assert [output.outputs for output in outputs] == [output.outputs for output in cold]
    assert outputs[0].usage.cached_tokens == 96 and salted.usage.cached_tokens == 0
    assert salted.outputs == cold[0].outputs
    assert tight.stats().num_free_blocks == tight.stats().num_blocks


def test_requests_finish_while_as_much_as_possible_is_pinned(tight: LLM) -> None:
    most = tight.call(lambda engine: engine.scheduler.stats().max_pinned_blocks)
    assert most > 0
    pins = [tight.prefill(prompt(seed, 16)) for seed in range(most)]
    with pytest.raises(RequestError, match="release a prefix") as caught:
        tight.prefill(prompt(99, 16))
    assert caught.value.param == "prompt" and num_pinned(tight) == most
    again = tight.prefill(prompt(0, 16))  # pinned already
    longest = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    outputs = tight.generate([prompt(seed, 140) for seed in range(4)], longest)
    assert all(len(output.outputs[0].token_ids) == 300 for output in outputs)
    for pin in (*pins, again):
        pin.release()
    assert num_pinned(tight) == 0
    check(tight)


def test_a_system_prompt_is_shared_by_later_conversations(llm: LLM) -> None:
    with llm.prefill(SYSTEM) as pinned:
        for question in ("2+3?", "a=3 b=a+1 b?"):
            chat = [*SYSTEM, {"role": "user", "content": question}]
            assert llm.chat(chat, GREEDY)[0].usage.cached_tokens == pinned.num_tokens > 0


def test_a_finished_request_can_be_pinned(llm: LLM) -> None:
    (output,) = llm.generate(prompt(3, 40), GREEDY)
    session = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    with llm.prefill(output) as pinned:
        assert pinned.token_ids == session[:48]
    (pair,) = llm.generate(prompt(3, 40), SamplingParams(n=2, max_tokens=2))
    with pytest.raises(RequestError, match="2 samples") as caught:
        llm.prefill(pair)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(("given", "message"), [("a", "whole blocks of 16"), ([], "empty")])
def test_what_cannot_be_pinned_is_refused(llm: LLM, given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        llm.prefill(given)
    assert caught.value.param == "prompt"
    with pytest.raises(RequestError) as caught:
        llm.prefill(prompt(1, 40), cach_salt="x")  # type: ignore[call-arg]
    assert caught.value.param == "cach_salt"
    assert num_pinned(llm) == 0


def test_without_prefix_caching_nothing_can_be_pinned_or_saved() -> None:
    with LLM(max_num_seqs=2, enable_prefix_caching=False) as llm:
        for call in (llm.prefill, lambda ids: llm.save_session(ids, "/nowhere/s")):
            with pytest.raises(RequestError) as caught:
                call(prompt(1, 40))
            assert caught.value.param == "enable_prefix_caching"


def test_a_pin_ends_with_its_handle(llm: LLM) -> None:
    pinned = llm.prefill(prompt(5, 32))
    assert num_pinned(llm) == 2
    pinned.release()
    pinned.release()
    assert num_pinned(llm) == 0
    llm.prefill(prompt(5, 32))  # no one keeps it
    gc.collect()
    assert num_pinned(llm) == 0


@pytest.mark.parametrize("finished", [False, True])
def test_an_interrupted_prefill_pins_nothing(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    def interrupted(owner: Any, thread: Any, request: Any) -> None:
        stream = RequestStream(owner, thread, request)
        if finished:
            list(stream)
            assert num_pinned(llm) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(prefix, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.prefill(prompt(6, 32))
    gc.collect()
    assert num_pinned(llm) == 0
    check(llm)


# --- warm-up ---


def test_a_warm_up_records_steps_and_changes_nothing() -> None:
    options: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 4, "seed": 3}
    options |= {"max_num_batched_tokens": 64}
    sampled = SamplingParams(temperature=1.0, max_tokens=9)
    prompts = [prompt(seed, 70) for seed in range(3)]
    with LLM(**options) as cold, LLM(**options) as warm:
        warm.warmup(3)
        graphs = warm.engine.runner._cpu_graph  # type: ignore[attr-defined]
        assert set(graphs._graphs) == {(1, 1), (2, 2), (3, 3)}
        stats = warm.stats()
        assert stats.num_computed_tokens == 0 and stats.num_free_blocks == stats.num_blocks
        recorded = dict(graphs._graphs)
        first = warm.generate(prompts, sampled)
        assert all(graphs._graphs[sizes] is graph for sizes, graph in recorded.items())
        assert [o.outputs for o in first] == [o.outputs for o in cold.generate(prompts, sampled)]


def test_a_warm_up_beside_running_requests_changes_no_token(llm: LLM) -> None:
    (alone,) = llm.generate(prompt(8, 40), GREEDY)
    stream = llm.stream(prompt(8, 40), GREEDY)
    next(stream)
    llm.warmup()
    *_, output = stream
    assert output.outputs == alone.outputs  # type: ignore[union-attr]
    with pytest.raises(RequestError) as caught:
        llm.warmup(0)
    assert caught.value.param == "num_seqs"
