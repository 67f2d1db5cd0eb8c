"""A backend with scripted answers, without model and network, that records all requests."""

from collections.abc import Callable, Iterator

from s1engine.eval.backend import EvalRequest, EvalResponse, EvalSample
from s1engine.eval.tasks import Question


def sample(text: str, thinking: int = 4, output: int = 6, **fields: object) -> EvalSample:
    return EvalSample(text, thinking, output, **fields)  # type: ignore[arg-type]


def questions(count: int) -> list[Question]:
    """Question i asks for i; its answer is i."""
    return [Question(f"q{i}", f"what is {i}?", str(i)) for i in range(count)]


class ScriptedBackend:
    """Answers each request by ``script``, the last submitted first; an exception becomes the
    response's error."""

    name = "scripted"
    max_thinking = None
    can_think = True

    def __init__(self, script: Callable[[EvalRequest], list[EvalSample]]) -> None:
        self._script = script
        self._waiting: list[EvalRequest] = []
        self.asked: list[EvalRequest] = []
        self.most_waiting = 0
        self.generated_tokens = 0

    def submit(self, request: EvalRequest) -> None:
        self.asked.append(request)
        self._waiting.append(request)
        self.most_waiting = max(self.most_waiting, len(self._waiting))

    def responses(self) -> Iterator[EvalResponse]:
        while self._waiting:
            request = self._waiting.pop()
            try:
                samples = tuple(self._script(request))
            except RuntimeError as error:
                yield EvalResponse(request, (), 0.5, str(error))
                continue
            self.generated_tokens += sum(one.output_tokens for one in samples)
            yield EvalResponse(request, samples, 0.5)
