"""Fine-tune a model on reasoning traces.

torchrun --nproc_per_node 8 -m s1engine.training.sft s1_32b_8xh100 data=[s1k.jsonl]
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
from s1engine.extras import require_extra
from s1engine.training.sft.distributed import TrainingError
from s1engine.training.sft.resources import resource_report
from s1engine.training.sft.sft_config import SftConfig
from s1engine.training.sft.trainer import train


def parse_overrides(given: Sequence[str]) -> dict[str, Any]:
    """Fields of ``name=value`` pairs; values are YAML."""
    fields = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            raise RequestError(f"--set {pair}: must be name=value", param="set")
        fields[name] = yaml.safe_load(value)
    return fields


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="s1engine.training.sft", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("config", type=Path, help="YAML file, or the name of a bundled recipe")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="fields of the recipe")
    parser.add_argument("--set", nargs="*", default=[], metavar="name=value", help="the same")
    parser.add_argument("--dry-run", action="store_true", help="print what the run needs and stop")
    args = parser.parse_intermixed_args(arguments)
    rank = os.environ.get("RANK", "0")
    try:
        require_extra("train")
        config = SftConfig.read(args.config, **parse_overrides([*args.overrides, *args.set]))
        if args.dry_run:
            print(resource_report(config))
            return 0
        finished = train(config)
        if rank == "0":
            print(finished)
    except (RequestError, ModelError, TrainingError) as error:
        if rank == "0" or not isinstance(error, TrainingError):  # all ranks raise the same one
            prefix = "error" if rank == "0" else f"error: rank {rank}"
            print(f"{prefix}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
