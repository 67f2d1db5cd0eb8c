"""How models write tool calls: the formats' names, and which one a chat template teaches.

The server parses answers and states grammars by these names (``server/api/call_syntax.py``). Where
a format's markers are special tokens, answers that may call tools show them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s1engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A format of tool calls.

    Attributes:
        name: as in ``tool_call_parser``.
        markers: what stands around or in a call and may be a special token.
        signs: each is a text of chat templates that teach the format.
        ids: of the markers that are special tokens of a model.
    """

    name: str
    markers: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()
    ids: Mapping[str, int] = field(default_factory=dict)

    def of(self, tokenizer: "Tokenizer") -> "ToolFormat":
        """The format with the ids of a model."""
        ids = {marker: tokenizer.single_token_id(marker) for marker in self.markers}
        special = {m: i for m, i in ids.items() if i is not None and tokenizer.is_special(i)}
        return replace(self, ids=special)


HERMES = ToolFormat("hermes", ("<tool_call>", "</tool_call>"))
FORMATS: dict[str, ToolFormat] = {
    fmt.name: fmt
    for fmt in (  # where signs of several occur, the first is meant
        ToolFormat("openai", HERMES.markers, ("<|channel|>",)),
        ToolFormat("mistral", ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), ("[TOOL_CALLS]",)),
        ToolFormat(
            "pythonic", ("<|python_start|>", "<|python_end|>"), ("<|python_start|>", "[func_name1(")
        ),
        ToolFormat(
            "llama3_json", ("<|python_tag|>",), ("<|python_tag|>", '"parameters": dictionary of')
        ),
        ToolFormat("qwen3_coder", HERMES.markers, ("<function=",)),
        HERMES,
    )
}
ALIASES: dict[str, str] = {
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen3": "hermes",
    "qwen3_xml": "qwen3_coder",
    "llama3": "llama3_json",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "gpt-oss": "openai",
}
"""Names of vLLM and SGLang that differ from ours."""
TOOL_CALL_PARSERS = ("auto", *FORMATS, *ALIASES)
"""Values of the option."""


def find_tool_format(name: str, tokenizer: "Tokenizer") -> ToolFormat:
    """The format ``name`` of TOOL_CALL_PARSERS. ``auto``: the one that the chat template
    teaches; Hermes' in case of doubt, and where the template knows no tools, since then the prompt
    teaches that (``tool_prompt.py``)."""
    if name != "auto":
        return FORMATS[ALIASES.get(name, name)].of(tokenizer)
    template = tokenizer.tools_template
    found = (fmt for fmt in FORMATS.values() if any(sign in template for sign in fmt.signs))
    return next(found, HERMES).of(tokenizer)
