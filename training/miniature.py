"""s1 in miniature: select, train, force, plot, on two cores.

    python -m s1engine.training.miniature --out out/miniature

This is the command line; the work is in ``examples/miniature_pipeline.py``.
"""

import argparse
import sys
from pathlib import Path

from s1engine.errors import ModelError, RequestError
from s1engine.extras import require_extra
from s1engine.training.examples.miniature_pipeline import MiniatureSizes, run_miniature
from s1engine.training.examples.miniature_report import write_report
from s1engine.training.sft.distributed import TrainingError


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    add_arguments(parser)
    args = parser.parse_args()
    try:
        require_extra("train")
        write_report(run_miniature(parse_sizes(args), args.out), args.out)
    except (RequestError, ModelError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print((args.out / "miniature.md").read_text())
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each size."""
    defaults = MiniatureSizes()
    for name in MiniatureSizes.__slots__:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(defaults, name))


def parse_sizes(args: argparse.Namespace) -> MiniatureSizes:
    """The sizes of parsed flags."""
    return MiniatureSizes(**{name: getattr(args, name) for name in MiniatureSizes.__slots__})


if __name__ == "__main__":
    sys.exit(main())
