"""Prompts and parameters in every form that is meant, and the error of any other."""

from collections import OrderedDict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from s1engine import LLM, AsyncLLMEngine, EngineConfig, RequestError, SamplingParams
from s1engine.config import BUNDLED_MODEL
from s1engine.engine.prompts import params_of_each, split_conversations, split_prompts

IDS = [5, 6, 7]
PARAMS = SamplingParams(temperature=0, max_tokens=3)
MESSAGE = {"role": "user", "content": "a=3 b=a+4 b?"}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(Path(BUNDLED_MODEL), dtype="float32", max_num_seqs=np.int64(8))  # type: ignore[arg-type]


ONE_PROMPT: list[Any] = [
    IDS,
    tuple(IDS),
    range(5, 8),
    np.array(IDS),
    np.array(IDS, np.uint16),
    torch.tensor(IDS),
    [np.int32(5), torch.tensor(6), 7],
]


@pytest.mark.parametrize("prompt", ONE_PROMPT, ids=lambda prompt: type(prompt).__name__)
def test_ids_of_every_form_are_one_prompt(llm: LLM, prompt: Any) -> None:
    for given in (prompt, [prompt], (own for own in [prompt])):
        (output,) = llm.generate(given, PARAMS)
        assert output.prompt_token_ids[-3:] == IDS


def test_several_prompts() -> None:
    assert split_prompts("ab") == ["ab"]
    assert split_prompts(np.array([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]
    for prompts in (["a", [1]], ("a", [1]), iter(["a", [1]])):
        assert split_prompts(prompts) == ["a", [1]]
    assert split_prompts({"x": "a"}.values()) == ["a"]
    assert split_prompts([]) == []


def test_messages_are_mappings_of_any_type(llm: LLM) -> None:
    parts = MappingProxyType({"type": "text", "text": MESSAGE["content"]})
    forms: list[Any] = [
        MESSAGE,
        OrderedDict(MESSAGE),
        MappingProxyType(MESSAGE),
        {"role": "user", "content": (parts,)},
    ]
    expected = llm.chat([MESSAGE], PARAMS)[0].prompt_token_ids
    for form in forms:
        for chat in ([form], (form,), [[form]], iter([[form]])):
            (output,) = llm.chat(chat, PARAMS)
            assert output.prompt_token_ids == expected
    assert split_conversations([[MESSAGE], (MESSAGE,)]) == [[MESSAGE], [MESSAGE]]


def test_an_error_says_which_prompt(llm: LLM) -> None:
    with pytest.raises(RequestError, match="number 1: prompt: -1 is no token id below") as raised:
        llm.generate([[1], [-1]], PARAMS)
    assert raised.value.param == "prompt"
    with pytest.raises(RequestError, match=r"^prompt is empty"):
        llm.generate([""], PARAMS)


@pytest.mark.parametrize("prompt", [[1, "a"], [1.0], [True], [[[1]]], [1, [2]]])
def test_mixed_kinds_are_no_prompt(llm: LLM, prompt: Any) -> None:
    with pytest.raises(RequestError) as raised:
        llm.generate(prompt, PARAMS)
    assert raised.value.param == "prompt"


def test_parameters_are_sampling_params() -> None:
    assert params_of_each(PARAMS, 2) == params_of_each((PARAMS, PARAMS), 2) == [PARAMS, PARAMS]
    with pytest.raises(RequestError, match=r"got dict: write SamplingParams\(\*\*params\)"):
        params_of_each({"temperature": 0}, 1)
    with pytest.raises(RequestError, match="2 params for 3 prompts"):
        params_of_each([PARAMS, PARAMS], 3)


def test_options_of_an_engine_are_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match="did you mean max_num_seqs") as raised:
        LLM(max_num_sequences=8)  # type: ignore[call-arg]
    assert raised.value.param == "max_num_sequences"
    with pytest.raises(RequestError, match="either config or options"):
        AsyncLLMEngine(EngineConfig(), seed=1)
    with pytest.raises(RequestError, match="config must be an EngineConfig, got dict"):
        AsyncLLMEngine({})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="did you mean priority"):
        llm.generate("a", PARAMS, prioriti=1)  # type: ignore[call-arg]
