"""Requests whose grammar is being compiled; the engine steps on with the others meanwhile."""

from concurrent import futures

from s1engine.engine.grammar import GrammarCompiler
from s1engine.engine.live_request import LiveRequest

PATIENCE_S = 0.01  # of an engine that has nothing else to do


class PendingGrammars:
    """The waiting room of one engine."""

    def __init__(self, guides: GrammarCompiler) -> None:
        self._guides = guides
        self._waiting: list[LiveRequest] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, live: LiveRequest, grammar: str) -> None:
        """Has the grammar compiled, in another thread."""
        live.matcher = self._guides.submit(grammar)
        self._waiting.append(live)

    def remove(self, live: LiveRequest) -> bool:
        """Waits no more. False if it did not wait."""
        if live not in self._waiting:
            return False
        self._waiting.remove(live)
        return True

    def pop_ready(self, wait: bool) -> list[LiveRequest]:
        """Takes those whose grammar is there; if ``wait``, waits a moment for the first."""
        if wait and self._waiting:
            guides = [live.matcher for live in self._waiting if live.matcher is not None]
            futures.wait(guides, PATIENCE_S, futures.FIRST_COMPLETED)
        ready = [live for live in self._waiting if live.matcher and live.matcher.done()]
        self._waiting = [live for live in self._waiting if live not in ready]
        return ready
