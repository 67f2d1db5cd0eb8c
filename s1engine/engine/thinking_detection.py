"""Finds the ThinkingRule of a model when it loads.

A model is declared to think by ``--reasoning-format`` or ``--reasoning-start``, by the field
``reasoning_format`` of its config.json, or as one of s1's by its name or its card's ``base_model``.
Otherwise its chat template decides: a question is rendered with and without ``enable_thinking``.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s1engine.config import EngineConfig
from s1engine.engine.thinking_rule import ThinkingRule, common_prefix
from s1engine.errors import RequestError
from s1engine.models.config_reader import ConfigReader
from s1engine.reasoning import encode_format
from s1engine.reasoning_specs import FORMAT_SPECS, ReasoningFormatSpec, find_spec
from s1engine.tokenizer import Tokenizer

SWITCHES = ("enable_thinking", "thinking")  # template variables that switch thinking
PROBE = "What is thought?"
S1_NAME = re.compile(r"(?:^|[/\\]|--)s1(?:\.\d+)?-\d+(?:\.\d+)?b(?![a-z])", re.IGNORECASE)
BASE_MODEL = re.compile(r"^base_model:\s*(.*(?:\n\s*-.*)*)", re.MULTILINE)
MAX_CARD_CHARS = 2**16

logger = logging.getLogger(__name__)


def detect_thinking(
    config: EngineConfig, path: Path, tokenizer: Tokenizer, eos_token_ids: Sequence[int]
) -> ThinkingRule:
    """The rule of one model. Raises RequestError if the requested format does not fit it, and
    ModelError if its config.json names an unknown one."""
    probes = _Probes(tokenizer)
    by_default, template_thinks, reason = True, True, ""
    spec, declared = _declared(config, path)
    if declared == "reasoning_format none":
        spec, by_default, reason = None, False, declared
    elif spec is not None:
        template_thinks, reason = probes.thinks(spec), declared
    else:
        spec, by_default, reason = probes.find_format()
        template_thinks = by_default
        if spec is None:
            spec, reason = _by_vocabulary(tokenizer)
    fmt = None if spec is None else encode_format(spec, tokenizer, eos_token_ids)
    header = probes.header(spec) if spec is not None else ""
    return ThinkingRule(
        format=fmt,
        by_default=by_default,
        switch=probes.switch,
        template_thinks=template_thinks or probes.switch is None,
        reason=reason,
        trailer=probes.trailer,
        header=tuple(tokenizer.encode(header)) if header else (),
    )


# --- declared formats ---


def _declared(config: EngineConfig, path: Path) -> tuple[ReasoningFormatSpec | None, str]:
    """The format that user or model directory name, and where they do."""
    if config.reasoning_format != "auto" or config.reasoning_start is not None:
        name = "reasoning_start" if config.reasoning_start is not None else "reasoning_format"
        reason = f"{name} {config.reasoning_start or config.reasoning_format}"
        if config.reasoning_format == "none":
            return None, reason
        return find_spec(
            config.reasoning_format, config.reasoning_start, config.reasoning_end
        ), reason
    if not (path / "config.json").is_file():
        model = ConfigReader(path, {})
    else:
        model = ConfigReader.read(path / "config.json")
    name = model.get("reasoning_format")
    if name is not None:
        known = [*FORMAT_SPECS, "none"]
        if name not in known:
            raise model.error(
                "reasoning_format", f"must be one of {', '.join(known)}; got {name!r}"
            )
        return FORMAT_SPECS.get(name), f"reasoning_format {name}"
    names = [config.model, str(path), str(model.get("_name_or_path") or ""), *_base_models(path)]
    for name in names:
        if S1_NAME.search(name):
            return FORMAT_SPECS["s1"], f"the name {name}"
    return None, ""


def _base_models(path: Path) -> list[str]:
    """``base_model`` of the model card's front matter: one or several."""
    card = path / "README.md"
    if not card.is_file():
        return []
    with card.open(encoding="utf-8", errors="replace") as file:
        front = re.match(r"---\n(.*?)\n---", file.read(MAX_CARD_CHARS), re.DOTALL)
    found = BASE_MODEL.search(front.group(1)) if front else None
    return re.findall(r"[^\s'\"\[\],-][^\s'\"\[\],]*", found.group(1)) if found else []


def _by_vocabulary(tokenizer: Tokenizer) -> tuple[ReasoningFormatSpec | None, str]:
    """The format in which a model thinks that does not by its template, if a request asks."""
    for name, tokens in (("think-tag", ("<think>", "</think>")), ("s1", ())):
        spec = FORMAT_SPECS[name]
        if all(tokenizer.single_token_id(t) is not None for t in (*tokens, *spec.required)):
            return spec, "the template does not think; a request may ask"
    return None, "neither template nor vocabulary has a reasoning format"


# --- what the template renders ---


class _Probes:
    """A chat rendered with each value of the switch. A template that fails renders nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._source = tokenizer.template_source
        plain = self._render({})
        self._without_header = self._render({}, add_generation_prompt=False)
        self.trailer = plain.rpartition(PROBE)[2] if plain == self._without_header else ""
        self.switch: str | None = None
        self._texts: dict[bool | None, str] = {None: plain}
        for name in SWITCHES:
            on, off = (self._render({name: value}) for value in (True, False))
            if on != off:
                self.switch = name
                self._texts |= {True: on, False: off}
                break

    def _render(self, options: Mapping[str, Any], add_generation_prompt: bool = True) -> str:
        if not self._source:
            return ""
        messages = [{"role": "user", "content": PROBE}]
        try:
            return self._tokenizer.render_chat(
                messages,
                template_kwargs=dict(options),
                add_generation_prompt=add_generation_prompt,
            )
        except RequestError as error:
            logger.warning("the chat template fails with one question of the user: %s", error)
            return ""

    def _part(self, value: bool | None) -> str:
        return self._texts[value].rpartition(PROBE)[2]

    def find_format(self) -> tuple[ReasoningFormatSpec | None, bool, str]:
        """The format that the template opens, closes or mentions; whether its chats think by
        default, and why."""
        for spec in FORMAT_SPECS.values():
            states = {value: spec.block_state(self._part(value))[0] for value in self._texts}
            if not all(self._tokenizer.single_token_id(t) is not None for t in spec.required):
                continue
            if spec.is_in(self._source) or set(states.values()) != {"absent"}:
                thinks = self.thinks(spec)
                return spec, thinks, self._reason(spec, states[None], thinks)
        return None, False, ""

    def thinks(self, spec: ReasoningFormatSpec) -> bool:
        """Does the template let the model think if no request decides?"""
        state, _ = spec.block_state(self._part(None))
        if state != "absent":
            return state == "open"
        return self.switch is None or self._texts[None] == self._texts[True]

    def _reason(self, spec: ReasoningFormatSpec, state: str, thinks: bool) -> str:
        if state == "open":
            return f"the template opens {spec.open_marker}"
        if state == "closed":
            return f"the template closes {spec.open_marker}"
        if self.switch is not None:
            return f"the template heeds {self.switch}, by default {str(thinks).lower()}"
        return f"the template knows {spec.open_marker}"

    def header(self, spec: ReasoningFormatSpec) -> str:
        """What begins the assistant's turn, after the user's text has ended; without blanks."""
        plain, without = self._texts[None], self._without_header
        part = "" if plain == without else plain[common_prefix(plain, without) :]
        return part.partition(spec.open_marker)[0].strip()
