"""Requests whose grammar is being compiled; the engine steps on with the others meanwhile."""

from concurrent import futures

from s1engine.engine.group import Group
from s1engine.engine.guide import GuideMaker

PATIENCE_S = 0.01  # of an engine that has nothing else to do


class Preparation:
    """The waiting room of one engine."""

    def __init__(self, guides: GuideMaker) -> None:
        self._guides = guides
        self._waiting: list[Group] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, group: Group, grammar: str) -> None:
        """Has the grammar compiled, in another thread."""
        group.guide = self._guides.prepare(grammar)
        self._waiting.append(group)

    def leave(self, group: Group) -> bool:
        """Waits no more. False if it did not wait."""
        if group not in self._waiting:
            return False
        self._waiting.remove(group)
        return True

    def ready(self, patient: bool) -> list[Group]:
        """Takes those whose grammar is there; if ``patient``, waits a moment for the first."""
        if patient and self._waiting:
            guides = [group.guide for group in self._waiting if group.guide is not None]
            futures.wait(guides, PATIENCE_S, futures.FIRST_COMPLETED)
        ready = [group for group in self._waiting if group.guide and group.guide.done()]
        self._waiting = [group for group in self._waiting if group not in ready]
        return ready
