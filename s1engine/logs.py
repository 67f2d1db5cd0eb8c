"""Logging of the package: one level, one format.

Every module logs to ``logging.getLogger(__name__)``. A program that embeds s1engine configures
logging itself; the command line and the engine process call ``configure_logging``.
"""

import logging
import os

from s1engine.errors import RequestError

LEVEL_VARIABLE = "S1ENGINE_LOG_LEVEL"
LEVELS = ("debug", "info", "warning", "error", "critical")
FORMAT = "%(levelname)s %(asctime)s %(name)s: %(message)s"


def configure_logging() -> None:
    """Writes the package's log lines of at least $S1ENGINE_LOG_LEVEL (default: warning) to stderr.
    Raises RequestError for an unknown level."""
    name = os.environ.get(LEVEL_VARIABLE, "warning")
    if name.lower() not in LEVELS:
        raise RequestError(
            f"{LEVEL_VARIABLE} must be one of {', '.join(LEVELS)}; got {name!r}",
            param=LEVEL_VARIABLE,
        )
    logging.basicConfig(format=FORMAT)
    logging.getLogger("s1engine").setLevel(name.upper())
