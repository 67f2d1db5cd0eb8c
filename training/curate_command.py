"""Earlier name of ``python -m s1engine.training.curate``."""

import sys

from s1engine.training.curate.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
