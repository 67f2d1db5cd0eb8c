"""Grammars of tool calls: what they allow is what the parser reads, in every format."""

import functools
import json
import random
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from s1engine.server.api.calls_grammar import WRITERS, calls_grammar
from s1engine.server.api.tool_call_parser import ToolCallParser, parse_answer
from s1engine.server.api.tools import Function, properties_of
from s1engine.tokenizer import IncrementalDetokenizer, Tokenizer
from s1engine.tool_formats import FORMATS, TOOL_CALL_PARSERS, ToolFormat, find_tool_format
from tests.tiny_tokenizer import make_tokenizer

END = "<|im_end|>"
MARKERS = ("[TOOL_CALLS]", "[ARGS]", "<tool_call>", "</tool_call>")
FUNCTIONS = [
    Function(
        name="find",
        parameters={
            "properties": {
                "text": {"type": "string", "maxLength": 2},
                "count": {"type": "integer", "minimum": 0, "maximum": 20},
                "kind": {"enum": ["x", "y z"]},
                "deep": {"$ref": "#/$defs/flag"},
            },
            "required": ["count"],
            "$defs": {"flag": {"type": "boolean"}},
        },
    ),
    Function(
        name="look",
        parameters={
            "properties": {"a": {"type": "null"}, "b": {"type": "array", "maxItems": 1, "items": {
                "enum": [1, 2]}}}
        },
    ),
    Function(name="stop"),
]  # fmt: skip
TOOLS = {function.name: properties_of(function) for function in FUNCTIONS}


@functools.cache
def tokenizers(special: bool) -> tuple[Tokenizer, LLTokenizer]:
    tokenizer = make_tokenizer(("<|endoftext|>", END, *(MARKERS if special else ())))
    return tokenizer, LLTokenizer(tokenizer.to_json(), eos_token=tokenizer.single_token_id(END))


def matcher(grammar: str, special: bool) -> LLMatcher:
    found = LLMatcher(tokenizers(special)[1], LLMatcher.grammar_from_lark(grammar))
    assert not found.is_error(), (found.get_error(), grammar)
    return found


def drawn(grammar: LLMatcher, fmt: ToolFormat, special: bool, rng: random.Random) -> str | None:
    """A text that the grammar allows; None if it does not end soon."""
    tokenizer, end = tokenizers(special)[0], tokenizers(special)[0].single_token_id(END)
    decoder, text = IncrementalDetokenizer(tokenizer, fmt.ids.values()), ""
    grammar.reset()
    for _ in range(400):
        allowed = [i for i, bias in enumerate(grammar.compute_logit_bias()) if bias]
        token = end if end in allowed and rng.random() < 0.5 else rng.choice(allowed)
        assert grammar.consume_token(token)
        if token == end:
            return text + decoder.flush()
        text += decoder.push([token])
    return None


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", sorted(WRITERS))
def test_what_a_grammar_allows_is_read_as_calls(name: str, special: bool) -> None:
    fmt, rng = FORMATS[name].of(tokenizers(special)[0]), random.Random(7)
    one = matcher(calls_grammar(fmt, FUNCTIONS, 1), special)
    texts = [drawn(one, fmt, special, rng) for _ in range(12)]
    complete = [text for text in texts if text is not None]
    assert len(complete) > 6
    for text in complete:
        answer = parse_answer(ToolCallParser(False, TOOLS, name), text)
        assert answer.text == "" and len(answer.calls) == 1, text
        arguments = json.loads(answer.calls[0].arguments)
        match answer.calls[0].name:
            case "find":
                assert 0 <= arguments["count"] <= 20 and len(arguments.get("text", "")) <= 2
                assert arguments.get("kind", "x") in ("x", "y z")
                assert arguments.get("deep", True) in (True, False)
            case "look":
                assert arguments.get("a") is None and arguments.get("b", [1]) in ([], [1], [2])
            case other:
                assert (other, arguments) == ("stop", {})


CALLS = {
    "hermes": '<tool_call>\n{{"name": "find", "arguments": {{"count": {}}}}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=find>\n<parameter=count>\n{}\n</parameter>\n"
    "</function>\n</tool_call>",
    "llama3_json": '{{"name": "find", "parameters": {{"count": {}}}}}',
    "pythonic": "[find(count={})]",
    "mistral": '[TOOL_CALLS][{{"name": "find", "arguments": {{"count": {}}}}}]',
}
NEW_MISTRAL = '[TOOL_CALLS]find[ARGS]{{"count": {}}}'


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_free_answer_is_text_or_calls_that_keep_to_the_schema(name: str, special: bool) -> None:
    fmt = FORMATS[name].of(tokenizers(special)[0])
    grammar = matcher(calls_grammar(fmt, FUNCTIONS, 2, free=True), special)
    call = NEW_MISTRAL if special and name == "mistral" else CALLS[name]
    before = "" if name in ("llama3_json", "pythonic") else "Well,\n"

    def allows(text: str) -> bool:
        ids = tokenizers(special)[0].encode(text)
        grammar.reset()
        return bool(grammar.try_consume_tokens(ids) == len(ids) and grammar.is_accepting())

    assert allows("The answer is 4 {[<.") and allows("")
    assert allows(before + call.format(7))
    assert not allows(before + call.format(77)) and not allows(before + call.format('"7"'))
    many = {"llama3_json": "; ".join, "pythonic": None, "mistral": None}.get(name, "\n".join)
    if many is not None:
        assert allows(before + many([call.format(7)] * 2))
        assert not allows(before + many([call.format(7), call.format(77)]))


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ tools }}", "hermes"),
        ("no variable for them: <function=", "hermes"),
        ("{{ tools }}<tool_call><function=f>", "qwen3_coder"),
        ("{{ tools }}<|python_tag|>", "llama3_json"),
        ("{{ tools }}[TOOL_CALLS]", "mistral"),
        ("{{ tools }}[func_name1(params_name1=params_value1)]", "pythonic"),
        ("{{ tools }}<|channel|>", "openai"),
    ],
)
def test_the_template_decides_unless_the_user_does(template: str, name: str) -> None:
    tokenizer = make_tokenizer(template=template)
    assert find_tool_format("auto", tokenizer).name == name
    for chosen in TOOL_CALL_PARSERS[1:]:
        assert find_tool_format(chosen, tokenizer).name in FORMATS


@pytest.mark.parametrize("function", [
    Function(name="get-weather"),
    Function(name="class"),
    Function(name="f", parameters={"properties": {"a b": {}}}),
])  # fmt: skip
def test_what_python_cannot_name_is_refused_where_calls_are_python(function: Function) -> None:
    """Its parser would not read such calls."""
    with pytest.raises(ValueError, match="Python"):
        calls_grammar(FORMATS["pythonic"], [function], 1)
    assert calls_grammar(FORMATS["hermes"], [function], 1)


def test_markers_that_are_special_tokens_are_shown() -> None:
    tokenizer = tokenizers(True)[0]
    fmt = FORMATS["mistral"].of(tokenizer)
    text = 'é [TOOL_CALLS]find[ARGS]{"count": 1} é'
    ids = tokenizer.encode(text)
    assert set(fmt.ids) == {"[TOOL_CALLS]", "[ARGS]"} and set(fmt.ids.values()) <= set(ids)
    for size in (1, 2, len(ids)):
        decoder: Any = IncrementalDetokenizer(tokenizer, fmt.ids.values())
        parts = [decoder.push(ids[at : at + size]) for at in range(0, len(ids), size)]
        assert "".join(parts) + decoder.flush() == text
    plain = IncrementalDetokenizer(tokenizer)
    assert plain.push(ids) + plain.flush() == 'é find{"count": 1} é'
