"""Adapter of s1engine for ``bench embed``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "s1engine"


class EmbeddedS1Engine:
    """An EmbeddedModel."""

    concurrent = True

    def __init__(self, path: Path, threads: int, options: dict[str, Any]) -> None:
        from s1engine import LLM

        self._llm = LLM(str(path), num_threads=threads, **options)

    def encode(self, text: str) -> list[int]:
        """See EmbeddedModel."""
        return self._llm.compiler.text.tokenizer.encode(text)

    def stream(self, ids: list[int], new: int, rule: str | None = None) -> Iterator[str]:
        """See EmbeddedModel."""
        from s1engine import Chunk, SamplingParams

        rules: dict[str | None, dict[str, Any]] = {
            None: {},
            "penalty": {"repetition_penalty": 1.1},
            "bias": {"logit_bias": {ids[0]: -1.0}},
            "logprobs": {"logprobs": 5},
        }
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, **rules[rule])
        for event in self._llm.stream(ids, params):
            if isinstance(event, Chunk) and event.token_ids:
                yield event.text

    def complete_by(self, ids: list[int], new: int, deadline_s: float) -> int:
        """See EmbeddedModel."""
        from s1engine import SamplingParams

        milliseconds = round(1000 * deadline_s)
        params = SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, deadline_ms=milliseconds
        )
        return len(self._llm.generate(ids, params)[0].outputs[0].token_ids)


def load(path: Path, threads: int, options: dict[str, Any]) -> EmbeddedS1Engine:
    """The model, with fields of EngineConfig."""
    return EmbeddedS1Engine(path, threads, options)
