"""``s1engine generate``: answers prompts from the command line or a file, without a server.

A row of ``--input`` holds ``prompt`` or ``messages`` and any field of the HTTP API; the flags are
its defaults. A single prompt is streamed to the terminal.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from s1engine.cli.engine_options import engine_options
from s1engine.config import EngineConfig
from s1engine.errors import RequestError
from s1engine.flags import add_flags

# flag: (type, help); each is a field of the HTTP API with the same name
FIELDS: dict[str, tuple[type, str]] = {
    "thinking-token-budget": (int, "maximum of thinking tokens; 0 answers at once"),
    "min-thinking-tokens": (int, "the wait text replaces an earlier end of the model"),
    "num-waits": (int, "number of the model's own ends that the wait text replaces"),
    "wait-text": (str, "replaces an end (default: Wait); empty: only suppresses it"),
    "final-text": (str, "opens the answer after a forced end (default: the format's own)"),
    "answer-reserve": (int, "tokens of --max-tokens reserved for the answer"),
    "thinking-deadline-ms": (int, "wall-clock limit of the thinking"),
    "deadline-ms": (int, "wall-clock limit of the request; it ends with what it has"),
    "first-token-deadline-ms": (int, "the same while the request has no token"),
    "thinking-early-exit": (int, "stop once this many checkpoints in a row give one answer"),
    "thinking-loop-repeats": (int, "stop once a phrase repeats this many times in a row"),
    "max-tokens": (int, "maximum of generated tokens (default: what the context leaves)"),
    "temperature": (float, "0: greedy (default: the model directory's own)"),
    "top-p": (float, "keep the likeliest tokens up to this probability"),
    "top-k": (int, "keep the k likeliest tokens"),
    "min-p": (float, "drop tokens less likely than this times the likeliest"),
    "n": (int, "samples of each prompt"),
    "seed": (int, "of the sampling noise (default: drawn)"),
    "reasoning-effort": (str, "none, minimal, low, medium, high, xhigh or max"),
}
DIM, MARK, PLAIN = "\033[2m", "\033[33m", "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of input and output, of requests, and of the engine."""
    parser.add_argument("model", nargs="?", help="directory, GGUF file or hub id; default: s1-nano")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="a user's message; '-' reads stdin")
    source.add_argument("--messages", type=Path, metavar="FILE", help="a JSON list of messages")
    source.add_argument("--input", type=Path, metavar="FILE", help="JSON lines, one request each")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON lines here")
    parser.add_argument("--json", action="store_true", help="print one JSON object per request")
    parser.add_argument("--raw", action="store_true", help="continue prompts without chat template")
    fields = parser.add_argument_group("requests")
    for name, (kind, text) in FIELDS.items():
        metavar = {int: "N", float: "F", str: "S"}[kind]
        fields.add_argument(
            f"--{name}", type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text
        )
    fields.add_argument(
        "--thinking-checkpoints",
        type=_counts,
        metavar="N,N,...",
        default=argparse.SUPPRESS,
        help="smaller budgets at which to answer as well",
    )
    fields.add_argument(
        "--stop", action="append", metavar="S", default=argparse.SUPPRESS, help="repeatable"
    )
    add_flags(parser.add_argument_group("engine"), EngineConfig, skip=("model", "seed"))


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def run(args: argparse.Namespace) -> int:
    """Answers all prompts; ``--json`` and ``--output`` write one object per request, in order."""
    rows = _rows(args)

    from s1engine.cli.request_row import parse_row
    from s1engine.engine.llm import LLM

    options = engine_options(args)
    with contextlib.closing(LLM(progress=True, **options)) as llm:
        requests = [parse_row(llm, row, where, raw=args.raw) for where, row in rows]
        if args.input is None and not args.json and args.output is None:
            return _stream_to_terminal(llm, *requests[0])
        outputs = llm.generate_requests(
            [llm.make_request(p, s, **o) for p, s, o in requests], progress=True
        )
    ids = [{"id": row["id"]} if "id" in row else {} for _, row in rows]
    lines = [{**own, **out.to_json()} for own, out in zip(ids, outputs, strict=True)]
    if args.output is not None:
        with args.output.open("w", encoding="utf-8") as file:
            _write(lines, file)
    if args.json or args.output is None:
        _write(lines, sys.stdout)
    return 0


def _rows(args: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """The place of each request in its file, and its fields; flags are the defaults."""
    names = [*(name.replace("-", "_") for name in FIELDS), "thinking_checkpoints", "stop"]
    flags = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if args.input is not None:
        return [(where, {**flags, **row}) for where, row in _read_lines(args.input)]
    if args.messages is not None:
        text = args.messages.read_text(encoding="utf-8")
        return [("", {**flags, "messages": _parse(text, str(args.messages))})]
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    return [("", {**flags, "prompt": prompt})]


def _read_lines(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                row = _parse(line, where)
                if not isinstance(row, dict):
                    raise RequestError(f"{where}: must be a JSON object", param="input")
                yield where, row


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not JSON: {error}", param="input") from error


def _write(lines: list[dict[str, Any]], file: TextIO) -> None:
    for line in lines:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _stream_to_terminal(llm: Any, prompt: Any, params: Any, options: dict[str, Any]) -> int:
    """Prints a request while it is generated: thinking dimmed on a terminal, else only the
    answer."""
    from s1engine.outputs import CheckpointOutput, RequestOutput

    colour = sys.stdout.isatty()
    last = ""
    for event in llm.stream(prompt, params, **options):
        if isinstance(event, RequestOutput):
            print(f"{PLAIN if colour else ''}", flush=True)
            print(_summary(event), file=sys.stderr)
        elif isinstance(event, CheckpointOutput):
            text = " ".join(event.output.text.split())
            print(f"at {event.budget} thinking tokens: {text}", file=sys.stderr)
        elif colour:
            style = DIM if event.reasoning else PLAIN
            forced = MARK if event.reasoning and any(event.forced) else ""
            gap = "\n\n" if last == DIM and event.text else ""
            print(f"{PLAIN}{style}{forced}{event.reasoning}{gap}{event.text}", end="", flush=True)
            last = style if event.reasoning or event.text else last
        else:
            print(event.text, end="", flush=True)
    return 0


def _summary(output: Any) -> str:
    """One line of token counts and speed."""
    parts = []
    for sample in output.outputs:
        used = sample.thinking
        if used is not None:
            parts.append(
                f"thinking {used.tokens} tokens ({used.end_reason}, {used.waits_used} waits), "
                f"answer {len(sample.token_ids) - used.tokens}"
            )
    seconds = output.timing.total_s
    rate = output.usage.completion_tokens / max(seconds, 1e-9)
    return "; ".join([*parts, f"{seconds:.2f} s, {rate:,.0f} tokens/s"])
