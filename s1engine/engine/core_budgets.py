"""Thinking plans as the scheduler takes them, with the one format of the model in its token ids."""

from s1engine import _core
from s1engine.engine.model_text import ModelText
from s1engine.engine.request import CompiledBudget


class CoreBudgets:
    """Budgets for one model."""

    def __init__(self, text: ModelText) -> None:
        self._format = _core_format(text)

    def of(self, plan: CompiledBudget | None) -> _core.BudgetParams | None:
        """None for a request that does not think."""
        if plan is None:
            return None
        assert self._format is not None
        return _core.BudgetParams(
            format=self._format,
            wait=plan.wait,
            forced_end=plan.forced_end,
            delimiter_len=plan.delimiter_len,
            min_thinking=plan.min_thinking,
            num_waits=plan.num_waits,
        )


def _core_format(text: ModelText) -> _core.BudgetFormat | None:
    reasoning, tokenizer = text.format, text.tokenizer
    if reasoning is None:
        return None
    return _core.BudgetFormat(
        triggers=list(reasoning.triggers),
        natural_end=list(reasoning.natural_end),
        newline=list(reasoning.newline),
        newline_always=reasoning.newline_always,
        ends_in_newline=tokenizer.newlines,
    )
