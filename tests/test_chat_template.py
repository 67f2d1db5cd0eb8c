"""Chat templates: rendering, validation of messages, and hostile templates."""

import functools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.chat_template import REASONING_NAMES, ChatTemplate, resolve_turn
from s1engine.errors import RequestError
from s1engine.template_work import FREE_WORK
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


def test_output_is_bounded() -> None:
    template = ChatTemplate("{% for i in range(n) %}{{ part }}{% endfor %}", {})
    part = "a" * (2**20 - 256)  # and the steps
    assert len(template.render(CHAT, {"part": part, "n": 32})) > FREE_WORK - 2**14
    with pytest.raises(RequestError, match="more text"):
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


# --- names of the hub ---


def oracle(source: str, messages: Any, **options: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([messages], chat_template=source, **options)
    return str(rendered[0])


@pytest.mark.parametrize(
    "source",
    [
        "{{ {'b': 1, 'a': ['<é>']} | tojson(indent=2, sort_keys=true) }}",
        "{{ messages | tojson(separators=(',', ':'), ensure_ascii=true) }}",
        "{{ dict.fromkeys(['a', 'b'], 1) }}{{ dict([['c', 1]], d=2) }}",
        "{% set ns = namespace({'a': 1}, b=2) %}{% set ns.c = 3 %}{{ ns.a + ns.b + ns.c }}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
        "{{ 'a</think>b'.split('</think>')[-1].lstrip('\\n') }}{{ 'abc'.startswith('ab') }}",
        "{% for m in messages %}{% if m.a %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "{{ messages[::-1] | map(attribute='role') | join(',') }}",
        "{{ messages[-1].content is string and messages is iterable and tools is none }}",
        "{%- macro f(x) %}{{ x|trim }}{% endmacro %}\n  {%- set a = f(' y ') -%}\n{{ a }}",
    ],
)
def test_names_of_the_hub_mean_what_they_mean_there(source: str) -> None:
    messages = [{"role": "user", "content": " x "}, {"role": "user", "content": "é<"}]
    assert ChatTemplate(source, {}).render(messages, {}) == oracle(source, messages)


def test_json_is_read() -> None:
    source = (
        "{% set a = x | from_json %}{{ a.k[1] }}{{ (x | fromjson).k[0] }}{{ from_json(a).k[1] }}"
    )
    assert ChatTemplate(source, {}).render(CHAT, {"x": '{"k": [1, 2]}'}) == "212"


@given(st.integers(0, 6), st.sampled_from(["{{ 1 / 0 }}", "{{ x.y.z }}", "{{ 'a' | from_json }}"]))
def test_a_failing_template_names_its_line(above: int, failing: str) -> None:
    lines = ["{% if true %}"] * above + [failing] + ["{% endif %}"] * above
    with pytest.raises(RequestError, match=rf"^chat_template line {above + 1}: .") as raised:
        ChatTemplate("\n".join(lines), {}).render(CHAT, {})
    assert raised.value.param == "chat_template"
    lines[above] = "{% loop x in y %}"
    with pytest.raises(RequestError, match=rf"^chat_template line {above + 1}: .*loop"):
        ChatTemplate("\n".join(lines), {})


def test_a_failing_macro_names_the_line_inside_it() -> None:
    source = "{% macro f(x) %}\n\n{{ x / 0 }}{% endmacro %}\n{{ f(1) }}"
    with pytest.raises(RequestError, match="line 3"):
        ChatTemplate(source, {}).render(CHAT, {})


# --- earlier thinking ---


@pytest.mark.parametrize("name", REASONING_NAMES)
@settings(max_examples=10)
@given(text=st.text(max_size=20))
def test_thinking_of_earlier_turns_reaches_the_template_unchanged(name: str, text: str) -> None:
    messages = [{"role": "assistant", "content": "x", name: text}, *CHAT]
    for read in REASONING_NAMES:
        source = "{{ messages[0]." + read + " }}"
        if read == name:
            assert oracle(source, messages) == text
        assert ChatTemplate(source, {}).render(messages, {}) == text


# --- a chat that ends in the assistant's turn ---

TRIMMING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
DROPPING = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
texts = st.text(st.sampled_from("ab \n<>/think"), max_size=12)


@functools.cache
def source_of(name: str) -> str:
    if name in ("tiny", "trimming", "dropping"):
        return {"tiny": TEMPLATE, "trimming": TRIMMING, "dropping": DROPPING}[name]
    file = shared_file(f"tokenizer/{name}/tokenizer_config.json")
    return str(json.loads(file.read_text())["chat_template"])


@functools.cache
def template_of(name: str) -> ChatTemplate:
    return ChatTemplate(source_of(name), {})


@pytest.mark.parametrize("name", ["tiny", "trimming", "dropping", "qwen2.5", "qwen3"])
@given(texts, st.sampled_from(["", "Easy."]))
def test_a_continued_chat_is_that_of_transformers(name: str, text: str, thinking: str) -> None:
    template = template_of(name)
    last = {"role": "assistant", "content": text}
    messages = [*CHAT, last | ({"reasoning_content": thinking} if thinking else {})]
    try:
        expected = oracle(source_of(name), messages, continue_final_message=True)
    except ValueError:
        with pytest.raises(RequestError, match=r"messages\[1\]") as error:
            template.render(messages, {}, continue_final_message=True)
        assert error.value.param == "continue_final_message"
    else:
        assert template.render(messages, {}, continue_final_message=True) == expected


def test_only_text_of_the_assistant_is_continued() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    template = ChatTemplate("{{ tools }}{{ messages | tojson }}", {})
    for last in (CHAT[0], {"role": "assistant", "content": "x", "tool_calls": [call]}):
        with pytest.raises(RequestError) as error:
            template.render([last], {}, continue_final_message=True)
        assert error.value.param == "continue_final_message"


ANSWERED = [*CHAT, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [  # add_generation_prompt and continue_final_message
        (CHAT, {}, (True, False)),
        (ANSWERED, {}, (False, True)),
        (ANSWERED, {"add_generation_prompt": True}, (True, False)),
        (ANSWERED, {"add_generation_prompt": False}, (False, True)),
        (ANSWERED, {"continue_final_message": False}, (True, False)),
        (
            ANSWERED,
            {"add_generation_prompt": False, "continue_final_message": False},
            (False, False),
        ),
        (CHAT, {"add_generation_prompt": False}, (False, False)),
        (CHAT, {"continue_final_message": True}, (False, True)),
        ("nonsense", {}, (True, False)),
    ],
)
def test_how_a_chat_ends(messages: Any, options: Any, expected: tuple[bool, bool]) -> None:
    assert resolve_turn(messages, options) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_prompt": True, "continue_final_message": True},
        {"continue_final_message": "yes"},
    ],
)
def test_options_that_contradict_one_another_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as error:
        resolve_turn(ANSWERED, options)
    assert error.value.param == "continue_final_message"
