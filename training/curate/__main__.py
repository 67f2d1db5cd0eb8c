"""Curate training data: run the funnel of a YAML file.

python -m s1engine.training.curate curate.yaml
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from s1engine.errors import RequestError
from s1engine.extras import require_extra


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; errors are one line."""
    parser = argparse.ArgumentParser(
        prog="s1engine.training.curate", description=(__doc__ or "").splitlines()[0]
    )
    help_text = "YAML file; see s1engine.training.curate.curation_config"
    parser.add_argument("config", type=Path, help=help_text)
    args = parser.parse_args(arguments)
    try:
        require_extra("train")
        from s1engine.training.curate.curation_config import read_config
        from s1engine.training.curate.pipeline import CHOSEN, curate

        curation = read_config(args.config)
        curate(curation)
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(curation.out / CHOSEN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
