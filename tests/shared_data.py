"""The data set that accompanies the repository; tests that need it skip without it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_file(name: str) -> Path:
    """A file or folder of the data set by its relative name; skips the test if it is missing."""
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"no shared data: {path}")
    return path
