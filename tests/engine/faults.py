"""Bugs on demand: the priority of a request selects the place at which the engine raises.

``install`` adds them to this process; ``python -m tests.engine.faults FD`` is an engine process
with them.
"""

from collections.abc import Callable
from typing import Any

import pytest

from s1engine import _core
from s1engine.engine import engine_process
from s1engine.engine.core_output import branch_number, sample_index
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.output_processor import OutputProcessor

ADD, ADD_SECOND, ADD_AFTER_FORK, ADMIT, PROCESS, MASK, STEP = range(701, 708)
ALONE = (ADD, ADD_SECOND, ADD_AFTER_FORK, ADMIT, PROCESS, MASK)  # fail one request only


class Bug(Exception):
    """The exception of every fault."""


def install(patch: pytest.MonkeyPatch) -> None:
    """Installs the faults until ``patch`` is undone."""

    def before(owner: Any, name: str, faulty: Callable[..., bool]) -> None:
        real = getattr(owner, name)

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            if faulty(self, *args, **kwargs):
                raise Bug(name)
            return real(self, *args, **kwargs)

        patch.setattr(owner, name, wrapped)

    def adding(_: Any, sequence: int, *__: Any, priority: int, **___: Any) -> bool:
        return priority == ADD or (priority == ADD_SECOND and sample_index(sequence) > 0)

    real_add = _core.Scheduler.add

    def add_then_fail(self: Any, sequence: int, *args: Any, **kwargs: Any) -> None:
        real_add(self, sequence, *args, **kwargs)
        if kwargs["priority"] == ADD_AFTER_FORK:
            raise Bug("add")

    patch.setattr(_core.Scheduler, "add", add_then_fail)
    before(_core.Scheduler, "add", adding)
    before(
        LLMEngine,
        "_new_request",
        lambda _, sample, __: sample.live_request.request.priority == ADMIT,
    )
    before(
        OutputProcessor,
        "_process_one",
        lambda _, sample, __, ___: (
            sample.live_request.request.priority == PROCESS and not branch_number(sample.seq_id)
        ),
    )
    real_masks = OutputProcessor.grammar_masks

    def masks(self: OutputProcessor) -> Any:
        for sample in self._with_grammar.values():
            if sample.live_request.request.priority == MASK:
                sample.matcher = None if sample.finished else _Broken()  # type: ignore[assignment]
        return real_masks(self)

    patch.setattr(OutputProcessor, "grammar_masks", masks)
    before(
        LLMEngine,
        "_step",
        lambda engine, _: any(g.request.priority == STEP for g in engine._live_requests.values()),
    )


class _Broken:
    @property
    def mask(self) -> None:
        raise Bug("mask")

    def advance(self, tokens: list[int]) -> None:
        pass


if __name__ == "__main__":
    install(pytest.MonkeyPatch())
    engine_process.main()
