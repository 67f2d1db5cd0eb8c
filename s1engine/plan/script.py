"""What a simulated model samples: when it tries to end its thinking, when its answer is done.

Reads from the scheduler what became of it so far; decides nothing that the scheduler decides.
"""

from dataclasses import dataclass, field

from s1engine import _core
from s1engine.plan import workload
from s1engine.plan.served import Served
from s1engine.plan.workload import Budget

OTHER, TRIGGER, EOS, NEWLINE, PHRASE = 0, 1, 2, 3, 4  # token ids; prompts have none of them


@dataclass(slots=True)
class Script:
    """One request's script, and how far it has come."""

    served: Served
    budget: Budget
    _prompt_len: int = field(init=False)
    _tries_at: int = field(init=False)  # thinking tokens before the next try to end
    _answer_end: int = field(init=False)  # position of the answer's last token, once it is known
    _thinking: int = 0
    _max_thinking: int = 0
    _waits: int = 0
    _phase: _core.Phase | None = None

    def __post_init__(self) -> None:
        ask = self.served.ask
        self._prompt_len = workload.prompt_len(ask, self.budget)
        self._tries_at = ask.thinking or 0
        self._answer_end = 0

    def read(self, progress: "_core.Progress") -> None:
        """Takes note of what the scheduler made of the tokens so far."""
        served = self.served
        served.output_tokens += len(progress["token_ids"])
        served.forced_tokens += sum(m & _core.MARK_FORCED > 0 for m in progress["marks"])
        served.thinking_tokens = self._thinking = max(progress["thinking_tokens"], 0)
        self._max_thinking = progress["max_thinking"]
        if progress["waits_used"] > self._waits:
            self._waits = progress["waits_used"]
            self._tries_at = self._thinking + self.budget.wait_thinking
        if progress["phase"] != self._phase and progress["phase"] != _core.Phase.THINKING:
            self._answer_end = self._here + served.ask.answer - 1
        self._phase = progress["phase"]

    @property
    def _here(self) -> int:
        """Position of the next token."""
        return self._prompt_len + self.served.output_tokens

    def next_event(self) -> tuple[int, int]:
        """The position at which something besides OTHER is sampled or the budget cuts, and what is
        sampled there."""
        if self._phase != _core.Phase.THINKING:
            return self._answer_end, EOS
        tries = self._here + self._tries_at - self._thinking
        cut = self._here + self._max_thinking - self._thinking - 1
        return (tries, TRIGGER) if tries <= cut else (cut, OTHER)
