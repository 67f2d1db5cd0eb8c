"""The model for lm-evaluation-harness, over lm_eval or a stand-in: kwargs and the class."""

import sys
import types
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import pytest

from s1engine.errors import RequestError
from s1engine.eval import harness
from s1engine.sampling_params import ThinkingBudget


class Instance:
    """The part of a harness request that a model uses."""

    def __init__(self, context: str, **kwargs: Any) -> None:
        self.args = (context, kwargs)


class StandIn:
    """The part of the harness's base class that a model uses."""

    def __init__(self) -> None:
        self.cached: list[tuple[str, Any, str]] = []
        self.cache_hook = self

    def add_partial(self, kind: str, args: Any, answer: str) -> None:
        self.cached.append((kind, args, answer))


@pytest.fixture
def harness_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module over the real package if it is installed, else over a stand-in."""
    try:
        import_module("lm_eval.api.registry")
    except ImportError:
        registered: dict[str, type] = {}
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["lm_eval.api.model"].LM = StandIn  # type: ignore[attr-defined]
        registry = sys.modules["lm_eval.api.registry"]
        registry.register_model = lambda name: lambda cls: registered.setdefault(name, cls)  # type: ignore[attr-defined]
        registry.get_model = registered.__getitem__  # type: ignore[attr-defined]
        monkeypatch.delitem(sys.modules, "s1engine.eval.harness_model", raising=False)
    module = import_module("s1engine.eval.harness_model")
    assert import_module("lm_eval.api.registry").get_model("s1engine") is module.S1EngineLM
    return module


@pytest.fixture
def model_class(harness_model: Any) -> Any:
    return harness_model.S1EngineLM


def test_the_harness_own_kwargs(harness_model: Any) -> None:
    sampling_params = harness_model.sampling_params
    kwargs = {
        "until": ["\n\n", ""],
        "max_gen_toks": 64,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 1,
    }
    params = sampling_params(kwargs)
    assert (params.stop, params.max_tokens, params.temperature) == (("\n\n",), 64, 0.5)
    assert (params.top_p, params.seed, params.thinking) == (0.9, 1, None)
    assert sampling_params({"until": "x"}).stop == ("x",)
    assert sampling_params({}).temperature == 0 and sampling_params({}).max_tokens == 256
    assert sampling_params({"do_sample": False, "temperature": 1.0}).temperature == 0
    assert "until" in kwargs  # a request's kwargs are not changed


@pytest.mark.parametrize(
    ("kwargs", "budget"),
    [
        ({"thinking_token_budget": 9, "num_waits": 2}, ThinkingBudget(max_tokens=9, num_waits=2)),
        (
            {"max_tokens_thinking": "9", "thinking_n_ignore": 1, "thinking_n_ignore_str": "Hmm"},
            ThinkingBudget(max_tokens=9, num_waits=1, wait_text="Hmm"),
        ),
        ({"max_tokens_thinking": "auto"}, ThinkingBudget()),
        ({"min_tokens_thinking": 4}, ThinkingBudget(min_tokens=4)),
        ({"num_waits": 2, "thinking_n_ignore": 2}, ThinkingBudget(num_waits=2)),
    ],
)
def test_thinking_kwargs_in_both_spellings(
    harness_model: Any, kwargs: dict[str, Any], budget: ThinkingBudget
) -> None:
    params = harness_model.sampling_params({**kwargs, "max_gen_toks": 32})
    assert params.thinking == budget
    assert params.max_tokens == 32 + (budget.max_tokens or 0)


@pytest.mark.parametrize(
    ("kwargs", "param"),
    [
        ({"rejection_sample": True}, "rejection_sample"),
        ({"num_beams": 4}, "num_beams"),
        ({"num_waits": "many"}, "num_waits"),
        ({"num_waits": 1, "thinking_n_ignore": 2}, "thinking_n_ignore"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
    ],
)
def test_unknown_kwargs_and_bad_values_are_refused(
    harness_model: Any, kwargs: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as error:
        harness_model.sampling_params(kwargs)
    assert error.value.param == param


def test_chats_think_and_raw_prompts_do_not(harness_model: Any, model_class: Any) -> None:
    model = model_class(device="cpu", max_num_seqs=8)
    raw = Instance("a=3 b=a+1 b?", until=["?"], max_gen_toks=8)
    (plain,) = model.generate_until([raw], disable_tqdm=True)
    assert "?" not in plain
    messages = [{"role": "user", "content": "a=3 b=a+1 b?"}]
    chat = model.apply_chat_template(messages)
    assert chat.count("<|im_start|>") >= 2 and "a=3 b=a+1 b?" in chat
    budgets = [{"thinking_token_budget": n, "max_gen_toks": 24} for n in (0, 12)]
    texts = model.generate_until([Instance(chat, **kw) for kw in budgets], disable_tqdm=True)
    expected = [
        model._llm.chat(messages, harness_model.sampling_params(kw), progress=False)
        for kw in budgets
    ]
    assert texts == [outputs[0].outputs[0].text for outputs in expected]
    assert all(text.startswith("Final Answer:") for text in texts[:1])
    begun = model.apply_chat_template(
        [*messages, {"role": "assistant", "content": "b="}], add_generation_prompt=False
    )
    assert begun.endswith("assistant\nb=")
    (text,) = model.generate_until([Instance(begun, max_gen_toks=8)], disable_tqdm=True)
    raw = model._llm.generate(begun, harness_model.sampling_params({"max_gen_toks": 8}))
    assert text == raw[0].outputs[0].text and raw[0].outputs[0].thinking is None
    with pytest.raises(NotImplementedError):
        model.loglikelihood([])


def test_the_harness_finds_the_class_by_its_entry_point(model_class: Any) -> None:
    (found,) = entry_points(group="lm_eval.models", name="s1engine")
    assert found.load() is model_class


def test_the_command_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert harness.main() == 1
    assert "pip install 's1engine[harness]'" in capsys.readouterr().err
