"""Command line of s1 in miniature: select, train, force, plot, on two cores.

python -m s1engine.training.miniature --out out/miniature
"""

import argparse
import sys
from pathlib import Path

from s1engine.errors import ModelError, RequestError
from s1engine.training.examples import miniature_report
from s1engine.training.examples.miniature_pipeline import Sizes, run_miniature
from s1engine.training.sft.distributed import TrainingError


def main() -> int:
    """Command line: every size is a flag."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    add_arguments(parser)
    args = parser.parse_args()
    try:
        miniature_report.write(run_miniature(sizes_of(args), args.out), args.out)
    except (RequestError, ModelError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print((args.out / "miniature.md").read_text())
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each size."""
    defaults = Sizes()
    for name in Sizes.__slots__:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(defaults, name))


def sizes_of(args: argparse.Namespace) -> Sizes:
    """What the flags said."""
    return Sizes(**{name: getattr(args, name) for name in Sizes.__slots__})


if __name__ == "__main__":
    sys.exit(main())
