"""generation_config.json: stated values hold, the rest is refused by name; transformers is the
oracle of greedy decoding with every field that has an effect on it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig

from s1engine.config import EngineConfig
from s1engine.engine.llm import LLM
from s1engine.engine.model_text import ModelText
from s1engine.errors import ModelError
from s1engine.models.config_reader import ConfigReader
from s1engine.models.generation_config import (
    INERT,
    SUPPORTED,
    UNSUPPORTED,
    refuse_unsupported,
    sampling_defaults,
)
from s1engine.models.model_config import ModelConfig
from s1engine.sampling_params import SamplingParams
from tests.tiny_models import make_model
from tests.tiny_tokenizer import save_tokenizer

VOCABULARY = 323  # of the tiny tokenizer
FILE = Path("generation_config.json")
GENERATION: dict[str, Any] = {
    "do_sample": True,
    "eos_token_id": [95, 3, 95],
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "min_p": None,
}
STATED = {"repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20}


def defaults(**fields: Any) -> dict[str, Any]:
    return sampling_defaults(ConfigReader(FILE, fields), 96)


def config(path: Path, generation: Any, **fields: Any) -> ModelConfig:
    model = make_model(path, "qwen2", **fields)
    (model / FILE).write_text(json.dumps(generation))
    return ModelConfig.from_dir(model)


# --- sampling ---

sampling_values = {
    "temperature": st.floats(0, 100),
    "top_p": st.floats(0.01, 1),
    "min_p": st.floats(0, 1),
    "top_k": st.integers(-1, 200),
    "repetition_penalty": st.floats(0.1, 10),
}


@given(
    st.fixed_dictionaries({}, optional=sampling_values), st.sampled_from([None, True, False, ...])
)
def test_stated_values_hold(stated: dict[str, Any], do_sample: Any) -> None:
    fields = stated if do_sample is ... else {**stated, "do_sample": do_sample}
    found = defaults(**fields)
    if do_sample is False:
        assert found.pop("temperature") == 0
        stated = {name: value for name, value in stated.items() if name != "temperature"}
    expected = {**stated, "top_k": max(stated["top_k"], 0)} if "top_k" in stated else stated
    assert found == expected
    SamplingParams(**found)


def test_a_null_is_not_stated() -> None:
    assert defaults(**GENERATION) == STATED
    assert defaults(do_sample=None, temperature=None) == {}
    assert defaults() == {}
    assert SamplingParams(**defaults()).temperature == 1.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("top_p", 1.5),
        ("top_k", 0.5),
        ("top_k", -2),
        ("do_sample", "yes"),
        ("min_p", "x"),
        ("max_new_tokens", 0),
        ("suppress_tokens", [96]),
        ("suppress_tokens", list(range(5)) * 300),
        ("stop_strings", [""]),
        ("stop_strings", 5),
        ("eos_token_id", 96),
        ("eos_token_id", ["<eos>"]),
        ("eos_token_id", True),
    ],
)
def test_bad_values_are_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=rf"generation_config\.json: {key}"):
        config(tmp_path, {**GENERATION, key: value})


# --- unsupported fields ---


def test_every_field_of_transformers_has_a_rule() -> None:
    known = GenerationConfig().to_dict().keys()
    assert not known - UNSUPPORTED.keys() - INERT - SUPPORTED
    assert not (UNSUPPORTED.keys() & SUPPORTED) | (INERT & SUPPORTED) | (UNSUPPORTED.keys() & INERT)


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_what_would_change_results_is_refused(key: str) -> None:
    for neutral in (None, *UNSUPPORTED[key]):
        refuse_unsupported(ConfigReader(FILE, {key: neutral}))
    with pytest.raises(ModelError, match=rf"generation_config\.json: {key} \(7\)"):
        refuse_unsupported(ConfigReader(FILE, {key: 7}))


def test_unknown_names_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        refuse_unsupported(ConfigReader(FILE, {"use_cache": True, "moon_phase": 1}))
    assert "moon_phase" in caplog.text and "use_cache" not in caplog.text


# --- ends ---


def test_the_ends_are_a_union(tmp_path: Path) -> None:
    assert config(tmp_path, GENERATION).eos_token_ids == (95, 3, 1)
    assert config(tmp_path, {}, eos_token_id=[7, 8]).eos_token_ids == (7, 8)
    assert config(tmp_path, {"eos_token_id": 4}, eos_token_id=None).eos_token_ids == (4,)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer ends a turn by an id that no config names."""
    folder = tmp_path_factory.mktemp("model")
    path = make_model(folder, "qwen2", vocab_size=VOCABULARY, eos_token_id=7)
    assert save_tokenizer(path) == VOCABULARY
    return path


def test_the_tokenizers_own_end_is_one_of_them(model: Path) -> None:
    (model / FILE).write_text("{}")
    text = ModelText.load(EngineConfig(model=str(model)), model)
    own = text.tokenizer.eos_token_id
    assert own is not None and text.eos_token_ids == (7, own)
    assert text.format is not None and own in text.format.triggers


def test_a_tokenizers_end_outside_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path, "qwen2", vocab_size=300)
    save_tokenizer(path)  # 320 tokens
    with pytest.raises(ModelError, match="eos_token"):
        ModelText.load(EngineConfig(model=str(path)), path)


# --- against transformers ---

fields_of_greedy = st.fixed_dictionaries(
    {"do_sample": st.just(False)},
    optional={
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "suppress_tokens": st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40),
        "max_new_tokens": st.integers(1, 24),
        "top_k": st.just(5),
        "temperature": st.just(0.7),
    },
)


def test_greedy_tokens_are_those_of_transformers(model: Path) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    (model / FILE).write_text("{}")
    llm = LLM(str(model), progress=False, dtype="float32", device="cpu", reasoning_format="none")
    prompt = llm.engine.tokenizer.encode("the quick brown fox")

    @settings(max_examples=25)
    @given(fields_of_greedy)
    def check(fields: dict[str, Any]) -> None:
        found = sampling_defaults(ConfigReader(FILE, fields), VOCABULARY)
        params = SamplingParams(**{"max_tokens": 24, **found})
        sample = llm.generate([prompt], params, progress=False)[0].outputs[0]
        generation = GenerationConfig(**{"max_new_tokens": 24, **fields})
        ends = list(llm.engine.compiler.text.eos_token_ids)
        generation.update(eos_token_id=ends, pad_token_id=0)
        with torch.no_grad():
            ids = oracle.generate(torch.tensor([prompt]), generation_config=generation)
        assert sample.token_ids == ids[0, len(prompt) :].tolist()

    check()


def test_the_recommendation_can_be_switched_off(model: Path) -> None:
    generation = {**GENERATION, "eos_token_id": 5, "num_beams": 4}
    (model / FILE).write_text(json.dumps(generation))
    with pytest.raises(ModelError, match="num_beams"):
        ModelText.load(EngineConfig(model=str(model)), model)
    llm = LLM(str(model), progress=False, generation_config="none")
    assert llm.engine.default_sampling() == {}
    assert 5 in llm.engine.compiler.text.eos_token_ids
