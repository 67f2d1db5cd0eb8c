"""The structure of an answer, from SamplingParams to one grammar in llguidance's syntax.

The only place that builds grammars. GrammarValidator has them tried, GrammarCompiler compiles them.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from s1engine.engine.schema_keywords import check_keywords
from s1engine.errors import RequestError
from s1engine.sampling_params import MAX_GRAMMAR_CHARS, SamplingParams

# A model that may write blanks anywhere might never stop writing blanks.
COMPACT: Any = {"whitespace_flexible": False}
GBNF_MARK = "::="  # of llama.cpp's grammars, which Lark's syntax does not have
MAX_REASON_CHARS = 400  # of what llguidance says


def with_grammar(params: SamplingParams) -> SamplingParams:
    """The same parameters with the structure of the answer, if any, in ``grammar``. Raises
    RequestError that names the field which gave it."""
    name = params.structure
    if name is None:
        return params
    grammar = build_grammar(name, getattr(params, name))
    return replace(params, json_schema=None, regex=None, choice=None, grammar=grammar)


def build_grammar(name: str, value: Any) -> str:
    """The grammar of a structure: ``name`` is its field of SamplingParams. Raises RequestError that
    names it."""
    try:
        grammar = _build(name, value)
        _check_length(grammar)
    except Exception as error:  # llguidance has no error types
        text = " ".join(str(error).split())[:MAX_REASON_CHARS]
        raise RequestError(f"{name} is not usable: {text}", param=name) from error
    return grammar


def either(*grammars: str) -> str:
    """The grammar of texts that follow one of ``grammars``. Raises RequestError."""
    parts: list[Any] = []
    for i, grammar in enumerate(grammars):
        first, *others = _parts(grammar)
        parts += [{**first, "name": f"either{i}"}, *others]
    start = f"start: {' | '.join(f'@either{i}' for i in range(len(grammars)))}"
    return json.dumps({"grammars": [{"name": "start", "lark_grammar": start}, *parts]})


def _parts(grammar: str) -> list[Any]:
    """A grammar, in Lark's syntax or llguidance's JSON, as a list of JSON objects."""
    if not grammar.lstrip().startswith("{"):
        return [{"lark_grammar": grammar}]
    try:
        parts = json.loads(grammar)["grammars"]
        if parts and all(isinstance(part, dict) for part in parts):
            return [*parts]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise RequestError("grammar is neither Lark's syntax nor a list of grammars", param="grammar")


def _build(name: str, value: Any) -> str:
    from llguidance import LLMatcher  # loads only where it is needed

    if name == "json_schema":
        text = value if isinstance(value, str) else json.dumps(value)
        _check_length(text)
        schema = json.loads(text)
        check_keywords(schema)
        text = json.dumps(schema)  # one meaning, even if the text repeats a key
        grammar: str = LLMatcher.grammar_from_json_schema(text, overrides=COMPACT)
    elif name == "regex":
        grammar = LLMatcher.grammar_from_regex(value)
    elif name == "choice":
        grammar = from_lark(_choice(value))
    else:
        grammar = from_gbnf(value) if GBNF_MARK in value and not value.startswith("{") else value
    return grammar


def _check_length(text: str) -> None:
    """Raises ValueError."""
    if len(text) > MAX_GRAMMAR_CHARS:
        raise ValueError(f"its grammar has {len(text)} characters; at most {MAX_GRAMMAR_CHARS}")


def _choice(texts: Sequence[str]) -> str:
    """One of ``texts``, as a grammar in Lark's syntax."""
    return f"start: {' | '.join(json.dumps(text) for text in texts)}"


def from_gbnf(text: str) -> str:
    """The grammar of a text in llama.cpp's syntax, which XGrammar's EBNF has too."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    return from_lark(gbnf_to_lark(text))


def from_lark(text: str) -> str:
    """The grammar of a text in Lark's syntax."""
    from llguidance import LLMatcher

    grammar: str = LLMatcher.grammar_from_lark(text)
    return grammar
