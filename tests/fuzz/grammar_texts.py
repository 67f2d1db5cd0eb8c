"""Target ``grammars``: a schema, a regular expression or a grammar, tried and then followed.

The first byte chooses the kind. What the worker process accepts compiles in this process too, and
its masks always allow something, until it is found too costly; anything else is refused.
"""

import functools

import numpy as np

from s1engine.engine.grammar import GrammarCompiler
from s1engine.engine.structured_output import with_grammar
from s1engine.errors import RequestError, RequestFailedError, TryAgainError
from s1engine.sampling_params import SamplingParams
from tests.fuzz.target import Target
from tests.tiny_tokenizer import make_tokenizer

KINDS = ("json_schema", "regex", "grammar", "choice")
MAX_STEPS = 16


@functools.cache
def _compiler() -> GrammarCompiler:
    tokenizer = make_tokenizer()
    end = tokenizer.single_token_id("<|im_end|>")
    assert end is not None
    return GrammarCompiler(tokenizer, tokenizer.num_tokens, (end,))


def run(data: bytes) -> None:
    kind = KINDS[(data[0] if data else 0) % len(KINDS)]
    text = data[1:].decode(errors="ignore")
    try:
        value = tuple(text.split("\n")) if kind == "choice" else text
        params = with_grammar(SamplingParams(**{kind: value}))
        assert params.grammar is not None
        _compiler().validator.validate(params.grammar, kind)
    except (RequestError, TryAgainError) as error:
        assert str(error)
        return
    try:
        _follow(params.grammar, len(data))
    except RequestFailedError as error:
        assert "too costly" in str(error)


def _follow(grammar: str, choice: int) -> None:
    matcher = _compiler().submit(grammar).result().copy()
    for _ in range(MAX_STEPS):
        assert matcher.mask is not None
        allowed = np.flatnonzero(np.unpackbits(matcher.mask, bitorder="little"))
        assert len(allowed), "a mask allows nothing"
        matcher.advance([int(allowed[choice % len(allowed)])])


WORDS = [
    *(b'{"type":"object","properties":{"a":', b'"type":"string"', b'"enum":[', b'"anyOf":['),
    *(b'"required":[', b'"$ref":"#', b'"$defs":', b'"pattern":"', b'"minItems":', b'"maxLength":'),
    *(b"start: ", b"\n%ignore", b"%json {", b"%regex", b"/[a-z]+/", b"(?i)", b"\\p{L}", b"{1,9}"),
]
TARGETS = {"grammars": Target(run, WORDS, max_bytes=512, max_seconds=30)}
