"""s1 in miniature: a funnel, five small models, their accuracy at every budget (minutes).

The work is that of ``python -m s1engine.training.miniature``; here its result is kept with where it
was made.
"""

import argparse
from pathlib import Path
from typing import Any

from s1engine.training import miniature
from s1engine.training.examples import miniature_pipeline, miniature_report


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole story; table and figure go to ``args.out``."""
    found = miniature_pipeline.run_miniature(miniature.sizes_of(args), args.out)
    miniature_report.write(found, args.out)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench miniature``."""
    parser.add_argument("--out", type=Path, default=Path("out/miniature"))
    miniature.add_arguments(parser)
