"""What a measured engine and its measurer say to each other: JSON lines on stdin and stdout.

Owns the child's side: times, and that nothing but answers reaches stdout. Knows no engine:
an adapter is a module with

    PACKAGE                             the distribution whose version is reported
    PRECISIONS                          those that it has
    convert(source, target, precision)  Hugging Face directory to what ``load`` reads
    load(target, setup) -> generate     generate(prompts, new): greedy ids, exactly ``new`` a prompt
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

Ids = list[int]
Generate = Callable[[list[Ids], int], list[Ids]]


@dataclass(frozen=True)
class Setup:
    """What every engine is loaded with."""

    precision: str  # of the weights: bf16, int8, int4; activations and KV cache have 16 bits
    threads: int
    max_seqs: int
    max_len: int  # tokens of the longest sequence
    kv_tokens: int  # that all sequences of a run take together
    kv_token_bytes: int  # of one of them, over all layers, in bf16


class Child:
    """Answers the jobs of one measurer."""

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter
        self._generate: Generate | None = None

    def convert(self, source: str, target: str, precision: str) -> dict[str, Any]:
        """Writes what ``load`` reads."""
        self._adapter.convert(Path(source), Path(target), precision)
        return {}

    def load(self, target: str, setup: dict[str, Any]) -> dict[str, Any]:
        """Loads, and says one token: the end of the start-up."""
        begin = time.perf_counter()
        self._generate = self._adapter.load(Path(target), Setup(**setup))
        loaded = time.perf_counter()
        self._generate([[5, 6, 7, 8]], 1)
        said = time.perf_counter()
        return {
            "version": metadata.version(self._adapter.PACKAGE),
            "load_s": loaded - begin,
            "first_token_s": said - loaded,
        }

    def generate(self, prompts: list[Ids], new: int) -> dict[str, Any]:
        """Seconds of one run, and its tokens."""
        assert self._generate is not None
        begin = time.perf_counter()
        ids = self._generate(prompts, new)
        return {"seconds": time.perf_counter() - begin, "ids": ids}


def main(name: str) -> None:
    """Serves jobs of adapter ``name`` until stdin ends; each failure is an answer of its own."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints is no answer
    child: Child | None = None
    for line in sys.stdin:
        job = json.loads(line)
        try:
            child = child or Child(import_module(f"{__package__}.{name}"))
            answer = getattr(child, job.pop("do"))(**job)
        except Exception as error:  # an engine raises what it likes
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
