"""The process that ``bench cpu`` measures: it loads one engine and answers jobs as JSON lines.

Runs as a script in the engine's own environment, where s1engine may not be installed, so it imports
the standard library only. Owns the times and keeps stdout free of all but answers. Knows no engine:
an adapter is a file with

    PACKAGE                             distribution whose version is reported
    convert(source, target, precision)  Hugging Face directory to what ``load`` reads
    load(target, setup) -> generate     generate(prompts, new): greedy ids, exactly ``new`` a prompt
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

Ids = list[int]
Generate = Callable[[list[Ids], int], list[Ids]]


@dataclass(frozen=True)
class EngineSetup:
    """How every engine is loaded."""

    precision: str  # of the weights: bf16, int8, int4; activations and KV cache have 16 bits
    threads: int
    max_seqs: int
    max_len: int  # tokens of the longest sequence
    kv_tokens: int  # tokens of all sequences of a run together
    kv_token_bytes: int  # KV bytes of one token over all layers, in bf16


class AdapterServer:
    """Answers jobs through one adapter."""

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter
        self._generate: Generate | None = None

    def convert(self, source: str, target: str, precision: str) -> dict[str, Any]:
        """Write what ``load`` reads."""
        self._adapter.convert(Path(source), Path(target), precision)
        return {}

    def load(self, target: str, setup: dict[str, Any]) -> dict[str, Any]:
        """Load the model and generate one token, which ends the start-up."""
        begin = time.perf_counter()
        self._generate = self._adapter.load(Path(target), EngineSetup(**setup))
        loaded = time.perf_counter()
        self._generate([[5, 6, 7, 8]], 1)
        first_token = time.perf_counter()
        return {
            "version": metadata.version(self._adapter.PACKAGE),
            "load_s": loaded - begin,
            "first_token_s": first_token - loaded,
        }

    def generate(self, prompts: list[Ids], new: int) -> dict[str, Any]:
        """Seconds and tokens of one run."""
        assert self._generate is not None
        begin = time.perf_counter()
        ids = self._generate(prompts, new)
        return {"seconds": time.perf_counter() - begin, "ids": ids}


def load_module(path: str) -> Any:
    """The module in that file, under a name that hides no package."""
    spec = spec_from_file_location(f"file_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(adapter: str, server_file: str | None = None) -> None:
    """Answer jobs until stdin ends, each by a method of AdapterServer, or of the JobServer in
    ``server_file``; a failure becomes an answer with ``error``."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints goes to stderr
    make_server = load_module(server_file).JobServer if server_file else AdapterServer
    server: Any = None
    for line in sys.stdin:
        job = json.loads(line)
        try:
            server = server or make_server(load_module(adapter))
            answer = getattr(server, job.pop("do"))(**job)
        except Exception as error:  # engines raise exceptions of any kind
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
