"""The ``s1engine`` command: one module per subcommand, imported only when it is used.

Owns the exit statuses (0 done, 1 failed, 2 wrong usage, 3 the served engine died), the format of
errors (a user error is one line on stderr, never a traceback) and the configuration of logging.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from s1engine.errors import EngineDeadError, ModelError, RequestError
from s1engine.extras import require_extra
from s1engine.logs import configure_logging

DONE, FAILED, WRONG_USAGE, ENGINE_DIED, INTERRUPTED = 0, 1, 2, 3, 130

# name: (module with add_arguments(parser) and run(args) -> exit status, one line of help)
COMMANDS = {
    "serve": ("s1engine.cli.serve", "answer requests over HTTP, OpenAI's API"),
    "generate": ("s1engine.cli.generate", "answer prompts, offline"),
    "eval": ("s1engine.eval.command", "accuracy against thinking tokens"),
    "metrics": ("s1engine.eval.metrics_command", "Control, Scaling, Performance of runs in a file"),
    "bench": ("s1engine.bench.command", "measure this machine and this engine"),
    "info": ("s1engine.cli.info", "what this machine has and what a model needs"),
}
NEEDED_EXTRAS = {"serve": "server", "eval": "eval"}  # of commands; the others need none


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        configure_logging()
        args = _parse(words)
        status: int = args.run(args)
        sys.stdout.flush()  # raises here, not at exit, if the reader of a pipe has closed
        return status
    except RequestError as error:
        return _print_error(words, error, WRONG_USAGE)
    except (ModelError, EngineDeadError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        return _print_error(words, error, FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED


def _parse(words: list[str]) -> argparse.Namespace:
    from s1engine import __version__

    parser = argparse.ArgumentParser(
        prog="s1engine", description="Inference for models that think, with budgets."
    )
    parser.add_argument("--version", action="version", version=f"s1engine {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, line) in COMMANDS.items():
        own = commands.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.")
        if name in words[:1]:
            if name in NEEDED_EXTRAS:
                require_extra(NEEDED_EXTRAS[name])
            command = import_module(module)
            command.add_arguments(own)
            own.set_defaults(run=command.run)
    return parser.parse_args(words)


def _print_error(words: list[str], error: Exception, status: int) -> int:
    line = " ".join(str(error).split())
    print(f"s1engine {words[0] if words else ''}: error: {line}", file=sys.stderr)
    return status
