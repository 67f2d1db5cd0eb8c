"""``python -m s1engine.bench.studies NAME``: run a study; flags and output as ``s1engine
bench``."""

import argparse
import sys
from collections.abc import Sequence

from s1engine.bench import command
from s1engine.errors import RequestError

PROGRAM = "python -m s1engine.bench.studies"
NAMES = (
    "deadline_error",
    "draft_acceptance",
    "draft_speedup",
    "eval_overhead",
    "http_cost",
    "miniature",
    "model_impl",
    "quantized_kv_cache",
    "quantized_weights",
    "replica_cost",
    "sampling_rules",
    "server_memory",
    "servers",
    "tensor_parallel",
    "training_speed",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one study; return its exit status."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="One-off measurements.")
    command.add_arguments(parser, {name: f"studies.{name}" for name in NAMES})
    args = parser.parse_args(argv)
    try:
        return command.run(args, PROGRAM)
    except RequestError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
