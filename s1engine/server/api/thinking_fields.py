"""The thinking fields of a request: our own, and other engines' and APIs' spellings.

Our names are canonical; ``spellings`` has the others. Owns the map from effort to budget; a budget
beside an effort wins. Knows nothing of sampling.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from s1engine.checks import shown
from s1engine.errors import RequestError
from s1engine.sampling_params import UNLIMITED, ThinkingBudget
from s1engine.server.api.body import RequestBody, StrictBody, TokenIds
from s1engine.server.api.field_rules import FieldRules
from s1engine.server.api.spellings import (
    NO_THINKING,
    check_same,
    resolve,
    sent_fields,
    sent_names,
)

EFFORTS: Mapping[str, int | None] = {
    "minimal": 512,
    "low": 1024,
    "medium": 4096,
    "high": 16384,
    "xhigh": None,
    "max": None,
}
"""Thinking tokens of each ``reasoning_effort`` by default; None: what the context leaves."""


class ThinkingSwitch(StrictBody):
    """``thinking`` in Anthropic's shape."""

    rules = FieldRules(place="thinking.")

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class ReasoningSwitch(StrictBody):
    """``reasoning`` in OpenRouter's shape, and OpenAI's."""

    rules = FieldRules(
        frozenset({"summary", "generate_summary"}), {"exclude": (False,)}, place="reasoning."
    )

    effort: str | None = None
    max_tokens: int | None = None
    enabled: bool | None = None


class CustomParams(StrictBody):
    """``custom_params`` of SGLang, without the processor that they are for."""

    rules = FieldRules(place="custom_params.")

    thinking_budget: int | None = None


class NvExt(StrictBody):
    """``nvext`` of NIM and Dynamo."""

    rules = FieldRules(
        frozenset({"annotations", "agent_hints", "extra_fields", "cache_control"}), place="nvext."
    )

    max_thinking_tokens: int | None = None
    min_thinking_tokens: int | None = None


class ThinkingFields(RequestBody):
    """The thinking fields of a request, and their other spellings."""

    thinking_token_budget: Annotated[
        int | None, Field(description="Never think longer than this many tokens; 0 answers at once")
    ] = None
    min_thinking_tokens: Annotated[
        int | None, Field(description="An earlier end of the model is replaced by wait_text")
    ] = None
    num_waits: Annotated[
        int | None, Field(description="How many of the model's own ends wait_text replaces")
    ] = None
    wait_text: str | None = None
    final_text: Annotated[
        str | None, Field(description="Opens the answer after a forced end of the thinking")
    ] = None
    answer_reserve: Annotated[
        int | None, Field(description="Tokens of max_tokens that are kept for the answer")
    ] = None
    thinking_deadline_ms: Annotated[
        int | None, Field(description="Wall-clock limit of the thinking, from arrival")
    ] = None
    thinking_checkpoints: Annotated[
        TokenIds | None, Field(description="Smaller budgets at which to answer as well")
    ] = None
    thinking_early_exit: Annotated[
        int | None, Field(description="Stop once so many checkpoints in a row gave one answer")
    ] = None
    thinking_loop_repeats: Annotated[
        int | None, Field(description="Stop once a phrase stands so often in a row")
    ] = None
    deadline_ms: Annotated[
        int | None,
        Field(
            description="Wall-clock limit of the request, from arrival; it ends with what it has"
        ),
    ] = None
    first_token_deadline_ms: Annotated[
        int | None, Field(description="The same while the request has no token")
    ] = None
    enable_thinking: Annotated[bool | None, Field(description="false: answer without thinking")] = (
        None
    )

    thinking_budget: int | None = None
    max_thinking_tokens: int | None = None
    max_tokens_thinking: int | Literal["auto"] | None = None
    min_tokens_thinking: int | None = None
    thinking_n_ignore: int | None = None
    thinking_n_ignore_str: str | None = None
    thinking_budget_tokens: int | None = None
    reasoning_budget_tokens: int | None = None
    reasoning_max_tokens: int | None = None
    custom_params: CustomParams | None = None
    nvext: NvExt | None = None
    think: bool | None = None
    thinking: ThinkingSwitch | None = None
    reasoning: ReasoningSwitch | None = None
    reasoning_effort: str | None = None

    def requested_thinking(
        self, efforts: Mapping[str, int | None] = EFFORTS
    ) -> tuple[ThinkingBudget | None, bool | None]:
        """Return the budget, None if no thinking field was given, and ``enable_thinking``.

        Raises RequestError naming the field.
        """
        effort = self._effort(efforts)
        fields: dict[str, Any] = {
            "max_tokens": self._maximum(effort, efforts),
            "min_tokens": resolve(self, "min_thinking_tokens"),
            "num_waits": resolve(self, "num_waits"),
            "wait_text": resolve(self, "wait_text"),
            "final_text": resolve(self, "final_text"),
            "answer_reserve": resolve(self, "answer_reserve"),
            "deadline_ms": resolve(self, "thinking_deadline_ms"),
            "checkpoints": tuple(self.thinking_checkpoints) if self.thinking_checkpoints else None,
            "early_exit": resolve(self, "thinking_early_exit"),
            "loop_repeats": resolve(self, "thinking_loop_repeats"),
        }
        fields = {name: value for name, value in fields.items() if value is not None}
        thinks = effort not in (None, NO_THINKING)
        budget = ThinkingBudget(**fields) if fields or thinks else None
        return budget, self._enabled(effort)

    def sent_names(self) -> dict[str, str]:
        """Return the names of our fields as they were sent, where they differ."""
        names = sent_names(self)
        if effort := sent_fields(self, "reasoning_effort"):
            for name in ("enable_thinking", "thinking_token_budget"):  # an effort is both
                if not sent_fields(self, name):
                    names[name] = effort[0][0]
        return names

    def _effort(self, efforts: Mapping[str, int | None]) -> str | None:
        effort: str | None = resolve(self, "reasoning_effort")
        if effort not in (None, NO_THINKING, *efforts):
            raise RequestError(
                f"reasoning_effort must be one of {', '.join((NO_THINKING, *efforts))}; "
                f"got {shown(effort)}",
                param="reasoning_effort",
            )
        return effort

    def _maximum(self, effort: str | None, efforts: Mapping[str, int | None]) -> int | None:
        """The given budget, else that of the effort."""
        given: int | None = resolve(self, "thinking_token_budget")
        if given is not None or effort in (None, NO_THINKING):
            return given
        budget = efforts[effort]
        return UNLIMITED if budget is None else budget

    def _enabled(self, effort: str | None) -> bool | None:
        enabled: bool | None = resolve(self, "enable_thinking")
        if effort != NO_THINKING:
            return enabled
        for name, value in sent_fields(self, "enable_thinking"):
            check_same(name, value, sent_fields(self, "reasoning_effort")[0][0], False)
        return False


def parse_efforts(text: str) -> dict[str, int | None]:
    """Parse ``low=512,high=none`` as a map from effort to budget. Raises RequestError."""
    efforts: dict[str, int | None] = {}
    for pair in text.split(","):
        name, _, budget = (part.strip() for part in pair.partition("="))
        if not name or not (budget.isdecimal() or budget == "none"):
            raise RequestError(
                f"reasoning_effort_budgets: {pair!r} is not of the form name=tokens",
                param="reasoning_effort_budgets",
            )
        efforts[name] = None if budget == "none" else int(budget)
    return efforts
