"""Does a chat think? Decided by the model's chat template, the request and the user's options.

The vocabulary alone decides nothing: `<think>` and ChatML's tokens are in vocabularies of models
that do not think. What counts in a prompt is the *assistant's part*: what the template writes after
the last message, and what a message to be continued holds. A user may write a marker in a question.

    the template's assistant part   the chat thinks
    open block                      yes
    closed block                    no
    no block                        if the model was declared to think; else if the template knows
                                    the format's markers and, where ``enable_thinking`` changes what
                                    it renders, renders the same without it as with true

A thinking field of the request makes any chat think whose part has no block; false closes a block
that the template opens. A chat whose last message is continued thinks if it holds open thinking, as
does a raw prompt; with false both go on as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from s1engine.errors import RequestError
from s1engine.reasoning import ReasoningFormat, find_open_thinking
from s1engine.sampling_params import ThinkingBudget


@dataclass(frozen=True, slots=True)
class AssistantTurn:
    """The assistant's part of a rendered chat."""

    text: str
    begun: bool
    """The chat ends within the turn or has no header for it: it is too late to open thinking."""


@dataclass(frozen=True, slots=True)
class ThinkingRule:
    """How the chats of one model think."""

    format: ReasoningFormat | None
    """None: no request can think."""
    by_default: bool
    """A chat thinks if its assistant part has no block and the request does not decide."""
    switch: str | None
    """Template variable that switches thinking."""
    template_thinks: bool
    """The template lets the model think if the variable is not given."""
    reason: str
    """Why, for a reader."""
    trailer: str
    """What the template writes after a chat's last message even without being asked; empty if it
    heeds ``add_generation_prompt``."""
    header: tuple[int, ...]
    """Ids that begin the assistant's turn; empty if unknown."""

    @property
    def opens_itself(self) -> bool:
        """The model opens thinking that neither the prompt nor the template decides."""
        fmt = self.format
        opens = fmt is not None and fmt.spec.opens_itself
        return opens and self.by_default and self.switch is None

    def template_options(self, enable_thinking: bool | None, wanted: bool) -> dict[str, bool]:
        """Template variables for a chat; ``wanted``: a field of the request asks for thinking."""
        if enable_thinking is None and not self.template_thinks and (wanted or self.by_default):
            enable_thinking = True
        if enable_thinking is None:
            return {}
        return {name: enable_thinking for name in {"enable_thinking", self.switch or ""} - {""}}

    def assistant_part(self, text: str, messages_text: str) -> str:
        """What a rendered chat holds of the assistant's next turn.

        Args:
            messages_text: the same chat without generation prompt.
        """
        before = messages_text.removesuffix(self.trailer)
        return text[common_prefix(text, before) :]

    def open_in_chat(
        self,
        ids: list[int],
        turn: AssistantTurn,
        budget: ThinkingBudget | None,
        enable_thinking: bool | None,
    ) -> int | None:
        """Appends to the prompt of a chat what opens or closes its thinking, if it is missing.

        Returns the number of thinking tokens that ``ids`` already contains; None if the chat does
        not think. Raises RequestError naming the field that does not apply."""
        fmt, asking = self.format, _asking_field(budget, enable_thinking)
        if fmt is None:
            _refuse(asking, "this model has no reasoning format")
            return None
        state, thought = fmt.spec.block_state(turn.text)
        if enable_thinking is False:
            opens = state == "open" or (state == "absent" and self.opens_itself)
            if opens and not turn.begun:  # what a client began goes on as it is
                ids.extend(fmt.closed_block(state == "open"))
            return None
        if state == "open":
            return fmt.num_tokens(thought)
        if turn.begun:
            _refuse(asking, "the last message is continued and contains no open thinking")
            return None
        if state == "closed":
            strict = budget is None or budget.min_tokens > 0 or bool(budget.checkpoints)
            why = "the chat template closes the thinking of this chat"
            _refuse(asking if strict else None, why)  # a maximum holds anyway
            return None
        if asking is None and not self.by_default:
            return None
        ids.extend(fmt.start)
        return 0

    def open_in_text(
        self, ids: list[int], budget: ThinkingBudget | None, enable_thinking: bool | None
    ) -> int | None:
        """The same for a raw prompt, which ``enable_thinking`` False leaves as plain text."""
        fmt, asking = self.format, _asking_field(budget, enable_thinking)
        if fmt is None:
            _refuse(asking, "this model has no reasoning format")
            return None
        if enable_thinking is False:
            return None
        tokens_thought = self.tokens_thought(ids)
        if tokens_thought is None and asking is not None:
            ids.extend(fmt.start)
            return 0
        return tokens_thought

    def tokens_thought(self, prompt: Sequence[int]) -> int | None:
        """Thinking tokens that a raw prompt already holds; None if no thinking is open. Only what
        follows the last assistant header counts, if there is one."""
        fmt = self.format
        assert fmt is not None
        begin = _after_last(prompt, self.header) if self.header else 0
        if fmt.single_tokens:
            at = find_open_thinking(prompt[begin:], fmt)
            return None if at is None else len(prompt) - begin - at
        state, thought = fmt.spec.block_state(fmt.decode(prompt[begin:]))
        return fmt.num_tokens(thought) if state == "open" else None


def _refuse(asking: str | None, why: str) -> None:
    """Rejects a request that asks for thinking by the field ``asking``."""
    if asking is not None:
        raise RequestError(f"{why}, so no thinking field applies", param=asking)


def _asking_field(budget: ThinkingBudget | None, enable_thinking: bool | None) -> str | None:
    """The field by which a request asks for thinking. Raises RequestError if two contradict."""
    if budget is not None and enable_thinking is False:
        raise RequestError(
            "enable_thinking is false but a thinking budget is given", param="enable_thinking"
        )
    if budget is not None:
        return "thinking_token_budget"
    return "enable_thinking" if enable_thinking else None


def common_prefix(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    if a.startswith(b):
        return len(b)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _after_last(ids: Sequence[int], phrase: tuple[int, ...]) -> int:
    """Index after the last occurrence of ``phrase``, 0 if there is none."""
    if phrase[0] in ids:
        for begin in range(len(ids) - len(phrase), -1, -1):
            if ids[begin] == phrase[0] and tuple(ids[begin : begin + len(phrase)]) == phrase:
                return begin + len(phrase)
    return 0
