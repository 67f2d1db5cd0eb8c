"""Command line of the trainer.

torchrun --nproc_per_node 8 -m s1engine.training.sft s1_32b_8xh100 --set data=[s1k.jsonl]
python -m s1engine.training.sft s1_32b_8xh100 --dry-run
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from s1engine.errors import ModelError, RequestError
from s1engine.training.sft.distributed import TrainingError
from s1engine.training.sft.sft_config import SftConfig
from s1engine.training.sft.trainer import train


def parse_overrides(given: Sequence[str]) -> dict[str, Any]:
    """``name=value`` pairs, values as YAML reads them."""
    found = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            raise RequestError(f"--set {pair}: must be name=value", param="set")
        found[name] = yaml.safe_load(value)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path, help="YAML file, or the name of one that ships")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    args = parser.parse_args(arguments)
    try:
        config = SftConfig.read(args.config, **parse_overrides(args.set))
        if args.dry_run:
            from s1engine.training.sft.resources import make_plan

            print(make_plan(config))
            return 0
        finished = train(config)
        if os.environ.get("RANK", "0") == "0":
            print(finished)
    except (RequestError, ModelError, TrainingError) as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not isinstance(error, TrainingError):  # which all ranks raise alike
            print(
                f"error: {error}" if rank == "0" else f"error: rank {rank}: {error}",
                file=sys.stderr,
            )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
