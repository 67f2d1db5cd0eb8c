"""The thinking fields of a request: our own, and other engines' and APIs' spellings.

Our names are canonical. A request may use any spelling; two that disagree are an error. Owns the
map from effort to budget; a budget beside an effort wins. Knows nothing of sampling.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from s1engine.checks import shown
from s1engine.errors import RequestError
from s1engine.sampling_params import UNLIMITED, ThinkingBudget
from s1engine.server.api.body import RequestBody, StrictBody, TokenIds
from s1engine.server.api.field_rules import FieldRules

T = TypeVar("T")

EFFORTS: Mapping[str, int | None] = {
    "minimal": 512,
    "low": 1024,
    "medium": 4096,
    "high": 16384,
    "xhigh": None,
}
"""Thinking tokens of each ``reasoning_effort`` by default; None: what the context leaves."""
NO_THINKING = "none"


class ThinkingSwitch(StrictBody):
    """``thinking`` in Anthropic's shape."""

    rules = FieldRules(place="thinking.")

    type: Literal["enabled", "disabled"]
    budget_tokens: int | None = None


class ReasoningSwitch(StrictBody):
    """``reasoning`` in OpenRouter's shape, and OpenAI's."""

    rules = FieldRules(
        frozenset({"summary", "generate_summary"}), {"exclude": (False,)}, place="reasoning."
    )

    effort: str | None = None
    max_tokens: int | None = None
    enabled: bool | None = None


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
            "min_tokens": resolve_spellings(
                min_thinking_tokens=self.min_thinking_tokens,
                min_tokens_thinking=self.min_tokens_thinking,
            ),
            "num_waits": resolve_spellings(
                num_waits=self.num_waits, thinking_n_ignore=self.thinking_n_ignore
            ),
            "wait_text": resolve_spellings(
                wait_text=self.wait_text, thinking_n_ignore_str=self.thinking_n_ignore_str
            ),
            "final_text": self.final_text,
            "answer_reserve": self.answer_reserve,
            "deadline_ms": self.thinking_deadline_ms,
            "checkpoints": tuple(self.thinking_checkpoints) if self.thinking_checkpoints else None,
            "early_exit": self.thinking_early_exit,
            "loop_repeats": self.thinking_loop_repeats,
        }
        fields = {name: value for name, value in fields.items() if value is not None}
        thinks = effort not in (None, NO_THINKING)
        budget = ThinkingBudget(**fields) if fields or thinks else None
        return budget, self._enabled(effort)

    def requested_effort(self) -> str | None:
        """Return the effort, for the chat template. Raises RequestError if two differ."""
        return resolve_spellings(
            reasoning_effort=self.reasoning_effort,
            reasoning_effort_=self.reasoning.effort if self.reasoning else None,
        )

    def _effort(self, efforts: Mapping[str, int | None]) -> str | None:
        effort = self.requested_effort()
        if effort is not None and effort != NO_THINKING and effort not in efforts:
            raise RequestError(
                f"reasoning_effort must be one of {', '.join((NO_THINKING, *efforts))}; "
                f"got {shown(effort)}",
                param="reasoning_effort",
            )
        return effort

    def _maximum(self, effort: str | None, efforts: Mapping[str, int | None]) -> int | None:
        """The given budget, else that of the effort."""
        from_s1 = self.max_tokens_thinking
        given = resolve_spellings(
            thinking_token_budget=self.thinking_token_budget,
            thinking_budget=self.thinking_budget,
            max_thinking_tokens=self.max_thinking_tokens,
            max_tokens_thinking=UNLIMITED if from_s1 == "auto" else from_s1,
            thinking=self.thinking.budget_tokens if self.thinking else None,
            reasoning=self.reasoning.max_tokens if self.reasoning else None,
        )
        if given is not None or effort in (None, NO_THINKING):
            return given
        budget = efforts[effort]
        return UNLIMITED if budget is None else budget

    def _enabled(self, effort: str | None) -> bool | None:
        return resolve_spellings(
            enable_thinking=self.enable_thinking,
            thinking=self.thinking.type == "enabled" if self.thinking else None,
            reasoning=self.reasoning.enabled if self.reasoning else None,
            reasoning_effort=False if effort == NO_THINKING else None,
        )


def resolve_spellings(**spellings: T | None) -> T | None:
    """Return the common value of the given spellings, None if none is given.

    A trailing underscore is not part of a name. Raises RequestError naming two that differ.
    """
    given = [(name.rstrip("_"), value) for name, value in spellings.items() if value is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise RequestError(
                f"{given[0][0]} ({given[0][1]}) and {name} ({value}) differ; give one of them",
                param=name,
            )
    return given[0][1] if given else None


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
