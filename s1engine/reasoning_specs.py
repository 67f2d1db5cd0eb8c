"""Reasoning formats: how a family of models opens and ends its thinking.

A format is data: a few texts. Owns those of known families, and reads those of a user. Knows no
token ids (``reasoning``) and no model (``thinking_rule``).

    name         opens                             the model ends by      final text's separator
    think-tag    <think> newline                   </think>               two newlines
    s1           <|im_start|>think                 <|im_start|>, end of   newline
                                                   turn
    mistral      [THINK]                           [/THINK]
    seed-oss     <seed:think>                      </seed:think>
    openthinker  <|begin_of_thought|> two newlines <|end_of_thought|>     <|begin_of_solution|>
    gemma4       <|channel>thought newline         <channel|>
    gpt-oss      <|channel|>analysis<|message|>    <|end|>

Every model ends its thinking by an end-of-text token as well.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from s1engine.checks import check_unicode
from s1engine.errors import RequestError

MAX_FORMAT_CHARS = 1024  # of one text of a format
PARAM = "reasoning_format"


@dataclass(frozen=True, slots=True)
class ChannelSyntax:
    """An answer in messages, each with a header that names its channel (harmony).

    ``header_starts`` and ``header_end`` enclose a header; ``message_ends`` end a message. Messages
    of the ``thinking`` channel are thinking; those whose header has ``recipient`` and a name call
    this tool, the message being its arguments; all others are answer."""

    header_starts: tuple[str, ...]
    header_end: str
    message_ends: tuple[str, ...]
    thinking: str
    recipient: str


@dataclass(frozen=True, slots=True)
class ReasoningFormatSpec:
    """A format in texts. A JSON file of a format holds an object of its text, list and boolean
    fields."""

    name: str
    start: str
    """Opens the thinking after the assistant's header. Without blanks around it, it identifies open
    thinking in a prompt."""
    end: str
    """Ends the thinking; replaces what the model ended it by."""
    ends: tuple[str, ...] = ()
    """Texts by which the model ends its thinking; empty: ``end``."""
    newline: str = "\n"
    """Precedes a forced end."""
    newline_always: bool = True
    """False: only if the thinking does not end in a newline."""
    separator: str = "\n\n"
    """Between a forced end and its final text."""
    separator_always: bool = True
    """Even before an empty final text."""
    final_text: str = ""
    """Opens the answer after a forced end, unless the request has its own."""
    hidden: tuple[str, ...] = ()
    """Texts that are not shown in an answer, besides ``end`` and ``ends``."""
    required: tuple[str, ...] = ()
    """Texts that must be single tokens; other texts may be spelt out."""
    opens_itself: bool = True
    """The model opens its thinking if the prompt does not. An empty block prevents this."""
    tools_end: str = ""
    """Replaces ``end`` where tools are offered; empty: ``end``."""
    channels: ChannelSyntax | None = None

    @property
    def open_marker(self) -> str:
        """Identifies open thinking in a prompt."""
        return self.start.strip()

    @property
    def closers(self) -> tuple[str, ...]:
        """Texts after which thinking is not open."""
        return tuple(dict.fromkeys((*self.ends, self.end)))

    def closing_text(self, final_text: str) -> str:
        """Delimiter and final text of a forced end, without the newline before them."""
        separator = self.separator if final_text or self.separator_always else ""
        return self.end + separator + final_text

    def is_in(self, text: str) -> bool:
        """Does ``text`` hold a marker, without which it has no block?"""
        return self.open_marker in text or self.end in text

    def block_state(self, text: str) -> tuple[str, str]:
        """State of the thinking block in the assistant's turn ``text``: open, closed or absent;
        and, if it is open, the thinking that ``text`` already holds."""
        begin = text.rfind(self.open_marker)
        if begin < 0:
            return ("closed" if self.end in text else "absent"), ""
        thought = text[begin + len(self.open_marker) :]
        if any(closer in thought for closer in self.closers):
            return "closed", ""
        return "open", thought.removeprefix(self.start.lstrip()[len(self.open_marker) :])


_HARMONY = ChannelSyntax(
    header_starts=("<|start|>", "<|channel|>"),
    header_end="<|message|>",
    message_ends=("<|end|>", "<|return|>", "<|call|>"),
    thinking="analysis",
    recipient="to=functions.",
)
_HARMONY_HEADER = "<|start|>assistant"

FORMAT_SPECS = {
    spec.name: spec
    for spec in (
        ReasoningFormatSpec("think-tag", "<think>\n", "</think>"),
        ReasoningFormatSpec("mistral", "[THINK]", "[/THINK]", newline="", separator=""),
        ReasoningFormatSpec("seed-oss", "<seed:think>", "</seed:think>", newline="", separator=""),
        ReasoningFormatSpec(
            "openthinker",
            "<|begin_of_thought|>\n\n",
            "<|end_of_thought|>",
            newline="\n\n",
            separator="\n\n<|begin_of_solution|>\n\n",
            hidden=("<|begin_of_solution|>", "<|end_of_solution|>"),
        ),
        ReasoningFormatSpec(
            "gemma4", "<|channel>thought\n", "<channel|>", newline="", separator=""
        ),
        ReasoningFormatSpec(
            "gpt-oss",
            "<|channel|>analysis<|message|>",
            f"<|end|>{_HARMONY_HEADER}<|channel|>final<|message|>",
            ends=("<|end|>",),
            newline="",
            separator="",
            required=(*_HARMONY.header_starts, _HARMONY.header_end, *_HARMONY.message_ends),
            tools_end=f"<|end|>{_HARMONY_HEADER}",
            channels=_HARMONY,
        ),
        ReasoningFormatSpec(
            "s1",
            "<|im_start|>think",
            "<|im_start|>answer",
            ends=("<|im_start|>", "<|im_end|>"),
            newline_always=False,
            separator="\n",
            separator_always=False,
            final_text="Final Answer:",
            required=("<|im_start|>", "<|im_end|>"),
            opens_itself=False,
        ),
    )
}


# --- formats of a user ---


def find_spec(requested: str, start: str | None, end: str | None) -> ReasoningFormatSpec:
    """The format of this name, in this JSON file, or with these delimiters. Raises RequestError
    naming the field."""
    if start is not None and end is not None:
        return spec_of_delimiters(start, end)
    if requested.endswith(".json"):
        return read_spec(Path(requested))
    return FORMAT_SPECS[requested]


def spec_of_delimiters(start: str, end: str) -> ReasoningFormatSpec:
    """A format of two delimiters. Blanks before and after ``end`` surround a forced end."""
    bare = end.strip()
    begin = len(end) - len(end.lstrip())
    spec = ReasoningFormatSpec(
        "custom", start, bare, newline=end[:begin], separator=end[begin + len(bare) :]
    )
    _check_spec(spec, {"start": "reasoning_start", "end": "reasoning_end"})
    return spec


def read_spec(file: Path) -> ReasoningFormatSpec:
    """A format from a JSON file. Raises RequestError naming file and field."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{PARAM} {file}: {error}", param=PARAM) from error
    if not isinstance(values, dict):
        raise RequestError(f"{PARAM} {file}: must hold a JSON object", param=PARAM)
    names = [field.name for field in fields(ReasoningFormatSpec) if field.name != "channels"]
    for name in values:
        if name not in names:
            raise RequestError(
                f"{PARAM} {file}: unknown field {name!r}; known: {', '.join(names)}", param=PARAM
            )
    values = {"name": file.stem, **values}
    checked = {name: _field_value(file, name, value) for name, value in values.items()}
    for name in ("start", "end"):
        if name not in checked:
            raise RequestError(f"{PARAM} {file}: {name} is missing", param=PARAM)
    spec = ReasoningFormatSpec(**checked)
    _check_spec(spec, {}, f"{PARAM} {file}: ")
    return spec


def _field_value(file: Path, name: str, value: object) -> Any:
    """A field of a format's file with its type checked; a list becomes a tuple."""
    kind: type = {"ends": list, "hidden": list, "required": list}.get(name, str)
    if name in ("newline_always", "separator_always", "opens_itself"):
        kind = bool
    texts = value if isinstance(value, list) else []
    if not isinstance(value, kind) or not all(isinstance(text, str) and text for text in texts):
        wanted = {list: "a list of texts that are not empty", bool: "true or false", str: "a text"}
        raise RequestError(
            f"{PARAM} {file}: {name} must be {wanted[kind]}; got {value!r}", param=PARAM
        )
    return tuple(texts) if kind is list else value


def _check_spec(spec: ReasoningFormatSpec, params: dict[str, str], where: str = "") -> None:
    """Raises RequestError if a text is too long, is not Unicode or is empty and must not be, or if
    the delimiters are equal. ``params``: parameters by field, if they are not in one file."""
    for field in fields(spec):
        name, value = field.name, getattr(spec, field.name)
        param = params.get(name, PARAM)
        for text in value if isinstance(value, tuple) else (value,):
            if not isinstance(text, str):
                continue
            check_unicode(param, text)
            if len(text) > MAX_FORMAT_CHARS:
                raise RequestError(
                    f"{where}{params.get(name, name)} has {len(text)} characters; the limit is "
                    f"{MAX_FORMAT_CHARS}",
                    param=param,
                )
        if name in ("name", "start", "end") and not value.strip():
            raise RequestError(f"{where}{params.get(name, name)} is empty", param=param)
    if spec.end != spec.end.strip():
        raise RequestError(
            f"{where}end has blanks around it; they belong to newline and separator", param=PARAM
        )
    if spec.open_marker in spec.closers:
        raise RequestError(
            f"{where}{params.get('end', 'end')} equals the start", param=params.get("end", PARAM)
        )
