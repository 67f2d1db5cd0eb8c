"""Reasoning formats: how a family of models opens and ends its thinking.

A format is data. It is detected from the vocabulary, encoded once, and passed to the scheduler,
which knows nothing of text. Every end trigger is a single token, because it must be recognised when
it is sampled.

    name        opens               the model ends by     natural end            forced end
    s1          <|im_start|>think   <|im_start|>, end     <|im_start|>answer     newline if missing,
                                    of turn or text                              <|im_start|>answer,
                                                                                 newline, final text
    think-tag   <think> newline     </think>,             </think>               newline, </think>,
                                    end of text                                  two newlines,
                                                                                 final text
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from s1engine.errors import RequestError
from s1engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ReasoningFormatSpec:
    name: str
    required: tuple[str, ...]  # tokens that the vocabulary must have
    open_marker: str  # identifies open thinking in a prompt
    start: str
    triggers: tuple[str, ...]
    end: str
    separator: str  # between a forced end and its final text
    separator_always: bool  # even before an empty final text
    final_text: str
    newline_always: bool


FORMAT_SPECS = {
    "think-tag": ReasoningFormatSpec(
        name="think-tag",
        required=("<think>", "</think>"),
        open_marker="<think>",
        start="<think>\n",
        triggers=("</think>",),
        end="</think>",
        separator="\n\n",
        separator_always=True,
        final_text="",
        newline_always=True,
    ),
    "s1": ReasoningFormatSpec(
        name="s1",
        required=("<|im_start|>", "<|im_end|>"),
        open_marker="<|im_start|>think",
        start="<|im_start|>think",
        triggers=("<|im_start|>", "<|im_end|>"),
        end="<|im_start|>answer",
        separator="\n",
        separator_always=False,
        final_text="Final Answer:",
        newline_always=False,
    ),
}


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """A format in the token ids of one model."""

    name: str
    start: tuple[int, ...]
    """Appended to a prompt to open the thinking."""
    open_marker: tuple[int, ...]
    """Prefix of ``start`` that identifies open thinking."""
    triggers: tuple[int, ...]
    """Ids by which the model ends its thinking."""
    end_markers: tuple[str, ...]
    """Texts that end the thinking as well and are no single token."""
    natural_end: tuple[int, ...]
    """Replaces a trigger."""
    newline: tuple[int, ...]
    """Precedes a forced end."""
    newline_always: bool
    """False: only if the thinking does not end in a newline."""
    _encode: Callable[[str], list[int]]
    _spec: ReasoningFormatSpec

    def forced_end(self, final_text: str | None = None) -> tuple[int, ...]:
        """Delimiter and final text (None: the format's own), encoded as one string, without the
        newline before them."""
        spec = self._spec
        final = spec.final_text if final_text is None else final_text
        separator = spec.separator if final or spec.separator_always else ""
        return tuple(self._encode(spec.end + separator + final))


def detect_format(
    tokenizer: Tokenizer, eos_token_ids: Sequence[int], requested: str = "auto"
) -> ReasoningFormat | None:
    """The format named ``requested``. ``auto``: the first format whose tokens the vocabulary has,
    else None. ``none``: None.

    s1's delimiters are those of ChatML, so ``auto`` detects every ChatML model as s1; ``none``
    switches this off for models that do not think. Raises RequestError if the named format's tokens
    are missing.
    """
    if requested == "none":
        return None
    candidates = FORMAT_SPECS.values() if requested == "auto" else [FORMAT_SPECS[requested]]
    for spec in candidates:
        missing = [token for token in spec.required if tokenizer.single_token_id(token) is None]
        if not missing:
            return _encode_spec(spec, tokenizer, eos_token_ids)
        if requested != "auto":
            raise RequestError(
                f"reasoning_format {requested}: the tokenizer has no single token for "
                f"{', '.join(missing)}",
                param="reasoning_format",
            )
    return None


def _encode_spec(
    spec: ReasoningFormatSpec, tokenizer: Tokenizer, eos_token_ids: Sequence[int]
) -> ReasoningFormat:
    triggers = [tokenizer.single_token_id(token) for token in spec.triggers]
    ids = {token for token in triggers if token is not None} | set(eos_token_ids)
    return ReasoningFormat(
        name=spec.name,
        start=tuple(tokenizer.encode(spec.start)),
        open_marker=tuple(tokenizer.encode(spec.open_marker)),
        triggers=tuple(sorted(ids)),
        end_markers=(),
        natural_end=tuple(tokenizer.encode(spec.end)),
        newline=tuple(tokenizer.encode("\n")),
        newline_always=spec.newline_always,
        _encode=tokenizer.encode,
        _spec=spec,
    )


def find_open_thinking(prompt: Sequence[int], reasoning: ReasoningFormat) -> int | None:
    """Index of the first thinking token if the prompt's last thinking is open, else None.

    Searches backwards for the last marker or trigger, which in a chat is near the end.
    """
    marker, start = reasoning.open_marker, reasoning.start
    markers = {marker[0], *reasoning.triggers}
    for i in range(len(prompt) - 1, -1, -1):
        if prompt[i] in markers:
            if tuple(prompt[i : i + len(marker)]) != marker:
                return None
            whole = tuple(prompt[i : i + len(start)]) == start
            return i + (len(start) if whole else len(marker))
    return None
