"""Runs targets: ``python -m tests.fuzz [--seconds S] [--merge] [TARGET...]``.

atheris (libFuzzer) mutates the inputs of the corpus and keeps those that reach new code. New inputs
stay in ``build/fuzz/TARGET/corpus``; an input that raises, hangs or needs too much memory stays in
``build/fuzz/TARGET`` and ends its target. ``--merge`` does not fuzz: it rewrites the corpus in the
repository as the smallest set of inputs with the same coverage.
"""

import argparse
import logging
import shutil
import subprocess
import sys
from pathlib import Path

from tests.fuzz import target as targets

BUILD = Path(__file__).resolve().parents[2] / "build" / "fuzz"
INSTRUMENTED = ["s1engine", "jinja2", "json", "uvicorn", "tests.fuzz"]
MAX_RSS_MB = 3072
SLACK_S = 60  # for a start and the last input


def main() -> int:
    """Runs the targets one after another; the number of those that show a bug."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"of {', '.join(targets.MODULES)}"
    )
    parser.add_argument("--seconds", type=float, default=300, help="for all targets together")
    parser.add_argument("--merge", action="store_true", help="minimise the corpus instead")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    names = args.targets or list(targets.MODULES)
    if unknown := set(names) - set(targets.MODULES):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if args.child:
        _fuzz(names[0], flags)
    if args.merge:
        return sum(_merge(name) for name in names)
    failed = [name for name in names if not _run(name, args.seconds / len(names))]
    print(f"fuzz: {len(names)} targets, {args.seconds:g} s; bugs in: {', '.join(failed) or 'none'}")
    return len(failed)


def _run(name: str, seconds: float) -> bool:
    """Fuzzes one target in a process of its own; True if it shows no bug."""
    found, known = BUILD / name / "corpus", targets.CORPUS / name
    found.mkdir(parents=True, exist_ok=True)
    print(f"=== {name}: {seconds:.0f} s", flush=True)
    flags = [f"-max_total_time={max(round(seconds), 1)}", "-use_value_profile=1"]
    flags += [str(found), str(known)]
    return _start(name, flags, seconds + SLACK_S) == 0


def _merge(name: str) -> int:
    """Replaces the corpus of a target by the smallest set of its and the new inputs."""
    small = BUILD / name / "merged"
    shutil.rmtree(small, ignore_errors=True)
    small.mkdir(parents=True)
    known = targets.CORPUS / name
    status = _start(name, ["-merge=1", str(small), str(known), str(BUILD / name / "corpus")], None)
    if status == 0:
        for file in targets.corpus_files(name):
            if not file.name.startswith("bug-"):  # a regression input stays
                file.unlink()
        for file in small.iterdir():
            shutil.copy(file, known / file.name)
    return int(status != 0)


def _start(name: str, flags: list[str], timeout: float | None) -> int:
    """Exit status of libFuzzer with ``flags``, and with those that every run has."""
    target = targets.load(name)
    folder = BUILD / name
    words = folder / "words.dict"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in sorted(set(target.words))))
    command = [sys.executable, "-m", "tests.fuzz", "--child", name]
    common = [f"-dict={words}", f"-artifact_prefix={folder}/", f"-max_len={target.max_bytes}"]
    common += [
        f"-timeout={target.max_seconds}",
        f"-rss_limit_mb={MAX_RSS_MB}",
    ]
    return subprocess.run([*command, *common, *flags], timeout=timeout).returncode


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def _fuzz(name: str, flags: list[str]) -> None:
    """Never returns: libFuzzer ends the process."""
    logging.disable()
    import atheris  # an extra of its own, and only for some platforms

    with atheris.instrument_imports(include=INSTRUMENTED):
        target = targets.load(name)
    atheris.Setup([sys.argv[0], *flags], target.run_measured)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
