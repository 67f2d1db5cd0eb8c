"""The tool call parser: the result does not depend on the pieces, and no text is lost."""

import itertools
import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.server.api.call_syntax import SYNTAXES
from s1engine.server.api.tool_call_parser import (
    CallBegin,
    ParsedAnswer,
    Piece,
    ToolCall,
    ToolCallParser,
    parse_answer,
)

JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)
NAMES = st.text(min_size=1, max_size=8)
BLANKS = st.sampled_from(["", " ", "\n", "\n\n"])
TEXTS = st.text('ab {}"\\:,<>/\n', max_size=12)
FRAGMENTS = ["<tool_call>", "</tool_call>", "<tool", '{"name": "f", "arguments": {', "}", '"', "\\"]
FRAGMENTS += ['{"name": "f"', '"a": "</tool_call>"', " ", "\n", "x", "{", "]", '"name"', ", ", ":"]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, ToolCall]:
    """A call as written, and what it is."""
    name, arguments = draw(NAMES), draw(OBJECTS)
    text = json.dumps(arguments, ensure_ascii=draw(st.booleans()))
    b = [draw(BLANKS) for _ in range(6)]
    head = f'{{{b[1]}"name":{b[2]}{json.dumps(name)},{b[3]}"arguments":{b[4]}'
    return f"<tool_call>{b[0]}{head}{text}{b[5]}}}\n</tool_call>", ToolCall(name, text)


def by_pieces(
    text: str, cuts: list[int], parser: ToolCallParser | None = None
) -> tuple[ParsedAnswer, list[Piece]]:
    parser, said, pieces = parser or ToolCallParser(), ParsedAnswer(), []
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for begin, end in itertools.pairwise(edges):
        pieces += parser.push(text[begin:end])
    pieces += parser.push("", last=True)
    said.add(pieces)
    return said, pieces


@given(st.lists(calls() | TEXTS.map(lambda t: (t, None)), max_size=5), st.lists(st.integers(0)))
def test_calls_are_parsed_however_the_text_is_cut(
    parts: list[tuple[str, ToolCall | None]], cuts: list[int]
) -> None:
    text = "".join(written for written, _ in parts)
    wanted = [call for _, call in parts if call is not None]
    said, pieces = by_pieces(text, cuts)
    assert said.calls == wanted
    assert said == parse_answer(ToolCallParser(), text)
    plain = "".join(written for written, call in parts if call is None)
    assert "".join(said.text.split()) == "".join(plain.split())
    if not wanted:
        assert said.text == plain
    begins = [piece.index for piece in pieces if isinstance(piece, CallBegin)]
    assert begins == list(range(len(wanted)))


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join), st.lists(st.integers(0)))
def test_nonsense_parses_the_same_however_it_is_cut(text: str, cuts: list[int]) -> None:
    assert by_pieces(text, cuts)[0] == parse_answer(ToolCallParser(), text)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join))
def test_text_without_an_opening_tag_is_left_alone(text: str) -> None:
    if "<tool_call>" not in text:
        assert parse_answer(ToolCallParser(), text) == ParsedAnswer(text)


def test_the_name_comes_first_and_arguments_as_they_are_written() -> None:
    parser = ToolCallParser()
    assert parser.push('So:\n<tool_call>\n{"name": "f", "argu') == ["So:"]
    begin, first = parser.push('ments": {"a": ')
    assert begin == CallBegin(0, "f") and first.text == '{"a": '  # type: ignore[union-attr]
    (more,) = parser.push('"}')
    assert more.text == '"}'  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"a\n{CALL}\n\n{CALL}\n", ParsedAnswer("a", [ToolCall("f", '{"a": 1}')] * 2)),
        # closing braces too many, no closing tag, and none of either
        (CALL.replace("}}", "}}}"), ParsedAnswer("", [ToolCall("f", '{"a": 1}')])),
        (CALL.removesuffix("</tool_call>"), ParsedAnswer("", [ToolCall("f", '{"a": 1}')])),
        (CALL.partition("1")[0], ParsedAnswer("", [ToolCall("f", '{"a": ')])),
        # the other order, and arguments as a string of JSON
        (
            '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
            ParsedAnswer("", [ToolCall("f", '{"a": 1}')]),
        ),
        (
            '<tool_call>{"name": "f", "arguments": "{\\"a\\":1}"}</tool_call>',
            ParsedAnswer("", [ToolCall("f", '{"a":1}')]),
        ),
        # no arguments, and another name for them
        *(
            (
                f'<tool_call>{{"name": "f"{more}}}</tool_call> x',
                ParsedAnswer("x", [ToolCall("f", said)]),
            )
            for more, said in [
                ("", "{}"),
                (', "arguments": null', "{}"),
                (', "arguments": {}', "{}"),
                (', "parameters": {"a": 1}', '{"a": 1}'),
            ]
        ),
        # no calls
        ("b \n<tool_call>{f(1)}</tool_call>", ParsedAnswer("b \n<tool_call>{f(1)}</tool_call>")),
        (
            '<tool_call>{"args": {}}</tool_call>',
            ParsedAnswer('<tool_call>{"args": {}}</tool_call>'),
        ),
        (
            '<tool_call>{"name": "", "arguments": {}}',
            ParsedAnswer('<tool_call>{"name": "", "arguments": {}}'),
        ),
        ('a <tool_call>{"name": "f', ParsedAnswer('a <tool_call>{"name": "f')),
        ("a <tool_ca", ParsedAnswer("a <tool_ca")),
        # more than a call
        (f"{CALL.removesuffix('</tool_call>')}b", ParsedAnswer("b", [ToolCall("f", '{"a": 1}')])),
        (f"{CALL} b ", ParsedAnswer("b ", [ToolCall("f", '{"a": 1}')])),
    ],
)
def test_what_becomes_of_text_that_is_not_quite_a_call(text: str, said: ParsedAnswer) -> None:
    assert parse_answer(ToolCallParser(), text) == said
    assert by_pieces(text, list(range(len(text))))[0] == said


@given(calls(), TEXTS.filter(lambda text: "<" not in text), st.lists(st.integers(0)))
def test_an_answer_that_its_first_call_ends_is_parsed_without_the_closing_tag(
    call: tuple[str, ToolCall], before: str, cuts: list[int]
) -> None:
    text = before + call[0].removesuffix("</tool_call>")
    assert parse_answer(ToolCallParser(once=True), text) == parse_answer(
        ToolCallParser(), text + "</tool_call>"
    )
    parser, said = ToolCallParser(once=True), ParsedAnswer()
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for begin, end in itertools.pairwise(edges):
        said.add(parser.push(text[begin:end]))
    said.add(parser.push("", last=True))
    assert said == parse_answer(ToolCallParser(once=True), text)
    assert parse_answer(ToolCallParser(once=True), before) == parse_answer(ToolCallParser(), before)


XML_TYPES: dict[str, Any] = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "flags": {"type": ["array", "null"]},
    "either": {"anyOf": [{"type": "object"}, {"type": "boolean"}]},
    "free": {},
}
XML_VALUES: dict[str, Any] = {
    "text": st.text('ab<>/{}"\n1', max_size=8).filter(lambda text: "</" not in text),
    "count": st.integers(),
    "flags": st.none() | st.lists(st.booleans(), max_size=3),
    "either": st.booleans() | OBJECTS.filter(lambda value: "</" not in json.dumps(value)),
    "free": st.text("ab 1", max_size=5),
}


@given(
    st.fixed_dictionaries({}, optional=XML_VALUES), TEXTS.filter(lambda t: "<" not in t), st.data()
)
def test_calls_in_xml_have_arguments_of_the_tools_types(
    arguments: dict[str, Any], before: str, data: st.DataObject
) -> None:
    written = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in arguments.items()
    }
    parts = [f"<parameter={name}>\n{value}\n</parameter>" for name, value in written.items()]
    text = "\n".join(
        [f"{before}<tool_call>", "<function=f>", *parts, "</function>", "</tool_call>"]
    )
    answer = parse_answer(ToolCallParser(tools={"f": XML_TYPES}), text)
    (call,) = answer.calls
    assert (call.name, json.loads(call.arguments)) == ("f", arguments)
    assert answer.text == before.rstrip()
    parser, said = ToolCallParser(tools={"f": XML_TYPES}), ParsedAnswer()
    cut = data.draw(st.integers(0, len(text)))
    for piece in (text[:cut], text[cut:]):
        said.add(parser.push(piece))
    said.add(parser.push("", last=True))
    assert said == answer
    for odd in ("NaN", "Infinity", "1e999", "[-Infinity]"):
        numbers = (
            f"<tool_call><function=f><parameter=count>{odd}</parameter></function></tool_call>"
        )
        (call,) = parse_answer(ToolCallParser(tools={"f": XML_TYPES}), numbers).calls
        assert json.loads(call.arguments) == {"count": odd}
    broken = text.replace("</function>", "", 1)
    assert parse_answer(ToolCallParser(), broken) == ParsedAnswer(broken)


# --- every format ---

TOOLS: dict[str, Any] = {"f": {"a": {}, "b": {}}, "g.h": {}}
SOME = [
    *FRAGMENTS,
    *("<function=f>", "</function>", "<parameter=a>", "</parameter>", "<|python_tag|>", ";"),
    *("[TOOL_CALLS]", "[ARGS]", "f", "[", '{"name": "f", "parameters": {"a": 1}}', ",", "[f(a=1)]"),
    *("<|python_start|>", "<|python_end|>", "(", ")", "f(b='x')", "'", '{"a": 1}'),
]


def make_parser(fmt: str, once: bool = False) -> ToolCallParser:
    return ToolCallParser(once, TOOLS, fmt)


@given(
    st.sampled_from(sorted(SYNTAXES)),
    st.booleans(),
    st.lists(st.sampled_from(SOME), max_size=12).map("".join),
    st.lists(st.integers(0)),
)
def test_every_format_parses_the_same_however_it_is_cut(
    fmt: str, once: bool, text: str, cuts: list[int]
) -> None:
    whole = parse_answer(make_parser(fmt, once), text)
    assert by_pieces(text, cuts, make_parser(fmt, once))[0] == whole
    assert by_pieces(text, list(range(len(text))), make_parser(fmt, once))[0] == whole
    assert len(whole.calls) <= 1 or not once


def written(fmt: str, wanted: list[ToolCall], bare: bool) -> str:
    """Calls as a model writes them."""
    objects = [(call.name, json.loads(call.arguments)) for call in wanted]
    if fmt == "llama3_json":
        texts = [json.dumps({"name": name, "parameters": own}) for name, own in objects]
        return ("" if bare else "<|python_tag|>") + "; ".join(texts)
    if fmt == "mistral" and bare:
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(own)}" for name, own in objects)
    if fmt == "mistral":
        calls = [{"name": name, "arguments": own} for name, own in objects]
        return "[TOOL_CALLS]" + json.dumps(calls)
    if fmt == "pythonic":
        texts = [
            f"{name}({', '.join(f'{key}={value!r}' for key, value in own.items())})"
            for name, own in objects
        ]
        text = f"[{', '.join(texts)}]"
        return text if bare else f"<|python_start|>{text}<|python_end|>"
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': own})}\n</tool_call>"
        for name, own in objects
    )


@given(
    st.sampled_from(sorted(SYNTAXES)),
    st.lists(
        st.tuples(
            st.sampled_from(["f", "g.h"]),
            st.dictionaries(st.sampled_from(["a", "b", "c_d"]), JSON, max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
    st.lists(st.integers(0)),
)
def test_calls_of_every_format_are_read(
    fmt: str, calls: list[tuple[str, dict[str, Any]]], bare: bool, cuts: list[int]
) -> None:
    wanted = [ToolCall(name, json.dumps(own)) for name, own in calls]
    text = written(fmt, wanted, bare)
    said, _ = by_pieces(text, cuts, make_parser(fmt))
    assert said.text == ""
    found = [(call.name, json.loads(call.arguments)) for call in said.calls]
    assert found == calls
    first, _ = by_pieces(text, cuts, make_parser(fmt, once=True))
    assert [(call.name, json.loads(call.arguments)) for call in first.calls] == calls[:1]


@pytest.mark.parametrize(
    ("fmt", "text", "said"),
    [
        # an answer in JSON or a list is no call unless it names a tool
        ("llama3_json", '{"name": "Bob", "parameters": {}} x', None),
        ("llama3_json", '{"name": "Bob"}', None),
        ("pythonic", "[print(1)] is code", None),
        ("pythonic", "[1, 2]", None),
        ("llama3_json", 'x {"name": "f", "parameters": {}}', None),
        # an opener before anything else is a special token, which is not shown
        ("llama3_json", "<|python_tag|>print(1)", ParsedAnswer("print(1)")),
        ("mistral", "so [TOOL_CALLS]!", ParsedAnswer("so !")),
        ("mistral", '[TOOL_CALLS]f{"a": 1}', ParsedAnswer("", [ToolCall("f", '{"a": 1}')])),
        (
            "mistral",
            '[TOOL_CALLS]f[CALL_ID]a1b2[ARGS]{"a": 1}',
            ParsedAnswer("", [ToolCall("f", '{"a": 1}')]),
        ),
        (
            "llama3_json",
            '{"type": "function", "name": "f", "parameters": {"a": 1}}',
            ParsedAnswer("", [ToolCall("f", '{"a": 1}')]),
        ),
        # JSON's words, arguments by their places, and what is no literal
        (
            "pythonic",
            "[f(true, b=null)]",
            ParsedAnswer("", [ToolCall("f", '{"a": true, "b": null}')]),
        ),
        ("pythonic", "[f(a=open('x'))]", None),
        ("pythonic", "[f(*a)]", None),
        ("pythonic", "[f(a=1, a=2)]", None),
        ("pythonic", "[f(a=1e999)]", None),
    ],
)
def test_what_is_a_call_in_a_format(fmt: str, text: str, said: ParsedAnswer | None) -> None:
    wanted = ParsedAnswer(text) if said is None else said
    assert parse_answer(make_parser(fmt), text) == wanted
    assert by_pieces(text, list(range(len(text))), make_parser(fmt))[0] == wanted


@pytest.mark.parametrize("fmt", sorted(SYNTAXES))
@pytest.mark.parametrize("unit", [" ", "<tool_call>{", "[TOOL_CALLS] f", "{", '["', "a<tool_"])
def test_a_long_answer_takes_linear_work(fmt: str, unit: str) -> None:
    """Counted in lines of Python that run."""

    def lines_for(count: int) -> int:
        parser, lines = make_parser(fmt), 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal lines
            lines += event == "line"
            return trace

        sys.settrace(trace)
        try:
            for _ in range(count):
                parser.push(unit)
            parser.push("", last=True)
        finally:
            sys.settrace(None)
        return lines

    assert lines_for(400) < 2.5 * lines_for(200)


XML = "<tool_call>\n<function=f>\n<parameter=text>\n{}\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    "value", ["a</tool_call>b", "</parameter>", "</function>\nx", "</tool_call>"]
)
def test_values_in_xml_may_hold_closing_tags(value: str) -> None:
    text = f"{XML.format(value)} {CALL}"
    said = parse_answer(ToolCallParser(tools={"f": XML_TYPES}), text)
    assert [json.loads(call.arguments) for call in said.calls] == [{"text": value}, {"a": 1}]
    cuts = list(range(len(text)))
    assert by_pieces(text, cuts, ToolCallParser(tools={"f": XML_TYPES}))[0] == said


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": True}, "true", True),
        ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
        ({"anyOf": [{"type": "integer"}, {}]}, "1", "1"),
        ({"allOf": [{"type": "array"}, {"minItems": 1}]}, "[1]", [1]),
        ({"type": ["string", "null"]}, "7", "7"),
    ],
)
def test_values_in_xml_have_the_types_that_a_schema_means(
    schema: dict[str, Any], text: str, value: Any
) -> None:
    parser = ToolCallParser(tools={"f": {"text": schema}})
    (call,) = parse_answer(parser, XML.format(text)).calls
    assert json.loads(call.arguments) == {"text": value}
