"""What a target is, and the list of them."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
MAX_GROWTH = 256 * 2**20  # bytes of memory that one input may need for a moment

MODULES = {
    "http": "http_bytes",
    "frames": "process_frames",
    "bodies": "request_bodies",
    "answers": "answer_texts",
    "templates": "template_sources",
    "config": "model_files",
    "safetensors": "model_files",
    "tokenizer": "model_files",
    "gguf": "model_files",
    "grammars": "grammar_texts",
}
"""Name of each target, and the module that defines it."""


@dataclass(frozen=True, slots=True)
class Target:
    """Something to fuzz.

    Args:
        run: handles one input; raises if that shows a bug, and for nothing else.
        words: byte strings that inputs are likely made of.
        max_bytes: of an input.
        max_seconds: of wall-clock time that one input may take while nothing else runs.
    """

    run: Callable[[bytes], None]
    words: Iterable[bytes] = ()
    max_bytes: int = 4096
    max_seconds: int = 5

    def run_measured(self, data: bytes) -> None:
        """The same as ``run``; raises MemoryError if it needs more than MAX_GROWTH."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
        before = _memory("VmRSS")
        self.run(data)
        growth = _memory("VmHWM") - before
        if growth > MAX_GROWTH:
            raise MemoryError(f"an input of {len(data)} bytes needs {growth / 2**20:.0f} MiB")


def load(name: str) -> Target:
    """The target of this name."""
    module = importlib.import_module(f"tests.fuzz.{MODULES[name]}")
    target: Target = module.TARGETS[name]
    return target


def corpus_files(name: str) -> list[Path]:
    """The corpus of a target."""
    return sorted((CORPUS / name).iterdir())


def _memory(field: str) -> int:
    """Bytes of this process by /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)
