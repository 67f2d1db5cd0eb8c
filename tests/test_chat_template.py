"""Chat templates: rendering, validation of messages, and hostile templates."""

import json
from typing import Any

import pytest

from s1engine.chat_template import REASONING_NAMES, ChatTemplate
from s1engine.errors import RequestError
from s1engine.template_environment import MAX_RENDERED_CHARS
from s1engine.tokenizer import Tokenizer
from tests.shared_data import shared_file
from tests.tiny_tokenizer import TEMPLATE, make_backend, make_tokenizer

TINY = make_tokenizer()


def test_templates_render_as_with_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2? <b>&amp;</b>"},
        {"role": "assistant", "content": "4", "reasoning_content": "Easy."},
        {"role": "user", "content": "And 3 + 3?\n"},
    ]
    for name in ("qwen2.5", "qwen3"):
        config = json.loads(shared_file(f"tokenizer/{name}/tokenizer_config.json").read_text())
        source = config["chat_template"]
        for options in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
            expected, _ = render_jinja_template(
                [messages], chat_template=source, add_generation_prompt=True, **options
            )
            assert ChatTemplate(source, {}).render(messages, options) == expected[0]


# --- messages ---


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (None, "messages"),
        ([5], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0]",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        (
            [{"role": "user", "content": "x"}, {"role": "user", "content": "y", "tool_calls": [1]}],
            "messages[1].tool_calls",
        ),
        ([{"role": "user", "content": "x", "name": 3}], "messages[0].name"),
        ([{"role": "user", "content": "x", "reasoning": "y"}], "messages[0].reasoning"),
        (
            [{"role": "assistant", "content": "x", "reasoning": "y", "reasoning_content": "z"}],
            "messages[0].reasoning_content",
        ),
    ],
)
def test_bad_messages_are_named(messages: Any, param: str) -> None:
    with pytest.raises(RequestError) as raised:
        TINY.render_chat(messages)
    assert raised.value.param == param


def test_messages_are_normalised() -> None:
    template = ChatTemplate("{{ messages | tojson }}", {})
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "assistant", "content": "c", "reasoning": "d", "refusal": None, "annotations": []},
    ]
    thinking = dict.fromkeys(REASONING_NAMES, "d")
    assert json.loads(template.render(messages, {})) == [
        {"role": "system", "content": "ab"},
        {"role": "assistant", "content": "c", **thinking},
    ]


def test_a_model_without_template_rejects_chats() -> None:
    bare = make_tokenizer(template=None)
    with pytest.raises(RequestError, match="no chat template"):
        bare.render_chat([{"role": "user", "content": "x"}])


# --- templates ---

CHAT = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ dict.__base__() }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ 'a' * 1000000000000 }}",
        "{{ 1000000000000 * [1] }}",
        "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages.nothing.here }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_hostile_templates_are_rejected(source: str) -> None:
    with pytest.raises(RequestError, match="chat_template") as raised:
        ChatTemplate(source, {}).render(CHAT, {})
    assert raised.value.param == "chat_template"


def test_a_broken_template_is_rejected_at_once() -> None:
    with pytest.raises(RequestError, match="chat_template") as raised:
        Tokenizer(make_backend(), "{% for %}")
    assert raised.value.param == "chat_template"


def test_the_output_bound_is_exact() -> None:
    template = ChatTemplate("{% for i in range(n) %}{{ part }}{% endfor %}", {})
    part = "a" * 2**20
    assert len(template.render(CHAT, {"part": part, "n": 32})) == MAX_RENDERED_CHARS
    with pytest.raises(RequestError, match="characters"):
        template.render(CHAT, {"part": part, "n": 33})


def test_a_template_can_refuse_messages() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(RequestError, match="roles must alternate") as raised:
        template.render(CHAT, {})
    assert raised.value.param == "messages"


def test_options_reach_the_template_but_never_replace_the_messages() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ enable_thinking }}", {})
    options = {"enable_thinking": False, "messages": [{"content": "other"}]}
    assert template.render(CHAT, options) == "xFalse"


def test_names_of_the_hub_are_known() -> None:
    source = (
        "{% generation %}{{ strftime_now('%Y') | length }}{% endgeneration %}"
        "{% set ns = namespace(a=1) %}{% for i in range(3) %}{% set ns.a = i %}{% break %}"
        "{% endfor %}{{ ns.a }}{{ {'k': '<é>'} | tojson }}{{ dict(a=1).a }}"
    )
    assert ChatTemplate(source, {}).render(CHAT, {}) == '40{"k": "<é>"}1'


def test_the_tiny_template_is_chatml() -> None:
    text = ChatTemplate(TEMPLATE, {}).render(CHAT, {})
    assert text == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
