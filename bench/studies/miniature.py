"""s1 in miniature: data selection, five small models, accuracy at every thinking budget (minutes).

Runs ``s1engine.training.miniature`` and adds machine, versions and commit to its result.
"""

import argparse
from pathlib import Path
from typing import Any

from s1engine.training import miniature
from s1engine.training.examples.miniature_pipeline import run_miniature
from s1engine.training.examples.miniature_report import write_report


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run it all; table and figure go to ``args.out``."""
    result = run_miniature(miniature.parse_sizes(args), args.out)
    write_report(result, args.out)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    parser.add_argument("--out", type=Path, default=Path("out/miniature"))
    miniature.add_arguments(parser)
