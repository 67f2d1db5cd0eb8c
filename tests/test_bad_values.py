"""Junk in every place where a Python user hands something over: a valid object or output, or a
RequestError that names the field; no other request notices.

``python -O -m tests.test_bad_values`` judges the same without assertions, so this file has none.
"""

import datetime
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine import LLM, Chunk, EngineConfig, RequestError, SamplingParams, ThinkingBudget
from s1engine.options import REQUEST_CHECKS, engine_config
from s1engine.sampling_params import HTTP_NAMES

CLASSES: list[Any] = [SamplingParams, ThinkingBudget, EngineConfig]
OTHER_FIELD = {
    "max_num_seqs": "max_num_batched_tokens",
    "reasoning_start": "reasoning_end",
    "reasoning_end": "reasoning_start",
}
"""A value that is right alone may need another field, which the error then names."""
ROOT = Path(__file__).resolve().parent.parent
CHAT = [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}]
CANARY = SamplingParams(temperature=0, max_tokens=600, thinking=ThinkingBudget(min_tokens=300))
SHORT = SamplingParams(max_tokens=1)


class Faulty:
    """Raises whatever one asks it for."""

    def __repr__(self) -> str:
        raise KeyError("repr")

    def __eq__(self, other: object) -> bool:
        raise KeyError("eq")

    __hash__ = object.__hash__


def junk() -> list[Any]:
    """New values of every kind; some iterators among them end with their first use."""
    numbers = [
        0,
        -1,
        1,
        3,
        2**31,
        2**64,
        -(2**70),
        10**5000,
        0.5,
        float("nan"),
        float("inf"),
        1e308,
    ]
    texts = ["", "a", "\n", "\ud800", "a\0b", "x" * 10**5, "1", "float32", "[0-9]", "{}", "{", b"a"]
    lists = [(), [], [None], [1, "a"], [[1], [2]], [1.5], [True], ["a", "\ud800"], ["a", ["b"]]]
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    mappings = [{}, {1: 2}, {"a": object()}, {1: 0.5}, {"temperature": 0}, {"1": 1}, {None: None}]
    unordered = [{1, 2}, frozenset(), {"a"}, iter([1]), range(3), (n for n in "ab"), cyclic]
    boxes = [np.int64(3), np.float32(0.5), np.bool_(True), np.array([1, 2]), np.array([[1]])]
    boxes += [np.array(1.5), np.array(["a"]), np.array([], int), np.array([None], object)]
    boxes += [torch.tensor([1]), torch.tensor(1), torch.tensor([[0.5]]), np.datetime64("2020")]
    objects = [object(), int, len, SamplingParams, SamplingParams(), ThinkingBudget(), Faulty()]
    objects += [Decimal(1), Fraction(1, 2), 1j, datetime.date(2020, 1, 1), Path("x"), ValueError()]
    return [None, True, False, *numbers, *texts, *lists, *mappings, *unordered, *boxes, *objects]


def wrong(text: str) -> AssertionError:
    return AssertionError(text)


def judge(call: Callable[[], object], allowed: set[str] | None, what: str) -> object:
    """Raises unless ``call`` returns, or raises a RequestError of one line that names one of
    ``allowed``, or any field if that is None. Returns what it returns, None for an error."""
    try:
        return call()
    except RequestError as error:
        root = str(error.param).partition("[")[0]  # of tools[0]
        if error.param is None or (allowed is not None and root not in allowed):
            raise wrong(f"{what}: {error} names {error.param}") from error
        if "\n" in str(error) or len(str(error)) > 1000:
            raise wrong(f"{what}: {error} is no short line") from error
    except Exception as error:
        raise wrong(f"{what}: {error!r}") from error
    return None


def judge_field(cls: Any, field: str, value: Any) -> None:
    allowed = {field, HTTP_NAMES.get(field, field), OTHER_FIELD.get(field, field)}
    made: Any = judge(lambda: cls(**{field: value}), allowed, f"{cls.__name__}.{field}")
    if made is None:
        return
    if replace(made) != made:
        raise wrong(f"{cls.__name__}.{field} changes when it is checked again")
    if field in ("json_schema", "logits_processors"):
        return  # stay in this process
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=cls)
    if sent != made:
        raise wrong(f"{cls.__name__}.{field} does not cross processes: {sent} {made}")


def judge_fields() -> None:
    for cls in CLASSES:
        for field in fields(cls):
            for value in junk():
                judge_field(cls, field.name, value)
    for value in junk():
        judge(lambda value=value: engine_config(value, {}), {"model"}, "model")


def judge_requests(llm: LLM) -> None:
    """Hands junk to a live engine while another request runs on it."""
    (expected,) = llm.chat(CHAT, CANARY)
    canary = llm.stream_chat(CHAT, CANARY)
    any_llm: Any = llm
    for value in junk():
        judge(lambda v=value: any_llm.generate(v, SHORT), None, "generate")
        judge(lambda v=value: any_llm.generate("a", v), {"params"}, "params")
        judge(lambda v=value: any_llm.generate("a", SHORT, **{"no_option": v}), {"no_option"}, "?")
    for value in junk():
        judge(lambda v=value: any_llm.chat(v, SHORT), None, "chat")
        for key in ("role", "content", "tool_calls"):
            message = {**CHAT[0], key: value}
            judge(lambda m=message: any_llm.chat([m], SHORT), None, f"messages {key}")
    for option in REQUEST_CHECKS:
        for value in junk():
            allowed = {option, "prompt", "messages"} if option == "tools" else {option}
            call = lambda o=option, v=value: any_llm.generate("a", SHORT, **{o: v})  # noqa: E731
            judge(call, allowed, option)
    text = "".join(event.text for event in canary if isinstance(event, Chunk))
    if text != expected.outputs[0].text:
        raise wrong(f"the canary answered {text!r}, alone {expected.outputs[0].text!r}")


def main() -> None:
    judge_fields()
    with LLM(dtype="float32", max_num_seqs=8) as llm:
        judge_requests(llm)
    print("judged")


def test_junk_in_fields_is_valid_or_named() -> None:
    judge_fields()


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers()), inner, max_size=3),
        st.sets(st.integers(), max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CLASSES), VALUES)
def test_random_values_are_valid_or_named(cls: Any, value: Any) -> None:
    for field in fields(cls):
        judge_field(cls, field.name, value)


def test_a_wrong_judgement_is_seen() -> None:
    with pytest.raises(AssertionError, match="names n"):
        judge(lambda: SamplingParams(n=0), {"x"}, "n")
    with pytest.raises(AssertionError, match="TypeError"):
        judge(lambda: len(5), {"x"}, "x")  # type: ignore[arg-type]


def test_junk_is_refused_without_assertions_and_harms_no_running_request() -> None:
    done = subprocess.run(
        [sys.executable, "-O", "-m", "tests.test_bad_values"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.stdout != "judged\n":
        raise wrong(done.stdout + done.stderr)


if __name__ == "__main__":
    main()
