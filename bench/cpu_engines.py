"""Engines as child processes: started one by one, stopped while another is measured.

Owns processes, environments and the parent's side of ``cpu_adapter``. Knows no case.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s1engine.errors import RequestError

FOLDER = Path(__file__).parent
ADAPTERS = {  # files below this folder
    "s1engine": "cpu_s1engine.py",
    "llama.cpp": "studies/peers/llama_cpp.py",
    "openvino": "studies/peers/openvino.py",
    "vllm": "studies/peers/vllm.py",
    "transformers": "studies/peers/transformers.py",
}
OWN = ("s1engine", "transformers")  # installed in this interpreter's environment
PEERS_VARIABLE = "S1ENGINE_PEERS"
JOB_SECONDS = 600.0
# Not as `python FILE`, which would put this folder, and names such as `host`, first on sys.path.
START = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


class EngineError(RuntimeError):
    """An engine process failed; the message holds its error."""


def environments(named: list[str]) -> dict[str, Path]:
    """Virtual environments of the engines, from ``NAME=FOLDER`` words and S1ENGINE_PEERS; the first
    mention counts."""
    folders: dict[str, Path] = {}
    for word in [*named, *os.environ.get(PEERS_VARIABLE, "").split()]:
        name, _, folder = word.partition("=")
        if name not in ADAPTERS or not folder:
            raise RequestError(
                f"peer {word!r} is not NAME=FOLDER with a name of {', '.join(ADAPTERS)}",
                param="peer",
            )
        folders.setdefault(name, Path(folder))
    return {**dict.fromkeys(OWN, Path(sys.prefix)), **folders}


def absent(name: str, folders: dict[str, Path]) -> str | None:
    """Why an engine cannot be started; None if it can."""
    if not (FOLDER / ADAPTERS[name]).exists():
        return "this installation has no driver for it: run bench cpu from a checkout of s1engine"
    if name not in folders:
        return f"no environment: name one with --peer {name}=FOLDER or {PEERS_VARIABLE}"
    python = folders[name] / "bin" / "python"
    return None if python.exists() else f"{python} does not exist"


@dataclass
class EngineProcess:
    """One engine. Jobs run one at a time; between jobs the process group is stopped (SIGSTOP).

    Args:
        scripts: files below this folder: the adapter of the engine, and the module of another
            ``JobServer`` than that of ``cpu_adapter``.
        folder: its virtual environment.
        log: file for the engine's own output.
        cache: folder for what the engine compiles.
    """

    scripts: tuple[str, ...]
    folder: Path
    threads: int
    log: Path
    cache: Path
    _process: "subprocess.Popen[str]" = field(init=False)
    start_time: float = field(init=False)

    def __post_init__(self) -> None:
        words = [str(self.folder / "bin" / "python"), "-c", START]
        words += [str(FOLDER / script) for script in ("cpu_adapter.py", *self.scripts)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "XDG_CACHE_HOME": str(self.cache),
            "HF_HUB_OFFLINE": "1",
        }
        self.start_time = time.perf_counter()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,
            )

    def run_job(self, do: str, **job: Any) -> dict[str, Any]:
        """The answer to one job. Raises EngineError."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"do": do, **job}) + "\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], JOB_SECONDS)
            line = self._process.stdout.readline() if ready else ""
        except BrokenPipeError:
            line = ""
        self._signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"no answer to {do}"}
        if "error" in answer:
            raise EngineError(f"{answer['error']} (its log: {self.log})")
        return answer

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def peak_mib(self) -> float:
        """Peak resident memory, mapped weights included, of this process and its live children.
        Read from /proc: getrusage would start at the parent's peak."""
        group = [p for p in Path("/proc").glob("[0-9]*") if _group_of(p) == self._process.pid]
        return sum(map(_peak_kib, group)) / 1024

    def close(self) -> None:
        """End the process and its children."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        with suppress(BrokenPipeError):  # a job that it never read
            self._process.stdin.close()


def _group_of(process: Path) -> int:
    """Process group of a folder in /proc: the third field after the name in brackets."""
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[2])
    except (FileNotFoundError, ProcessLookupError):  # the process has ended
        return 0


def _peak_kib(process: Path) -> int:
    lines = (process / "status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
