"""Runs a funnel from its YAML file.

python -m s1engine.training.curate curate.yaml
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from s1engine.errors import RequestError
from s1engine.training.curate import curation_config
from s1engine.training.curate.pipeline import CHOSEN, curate


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; what is wrong is said in one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "config", type=Path, help="YAML file; see s1engine.training.curate.curation_config"
    )
    args = parser.parse_args(arguments)
    try:
        plan = curation_config.read(args.config)
        curate(plan)
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(plan.out / CHOSEN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
