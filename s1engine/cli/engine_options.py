"""From the engine's flags to the fields of EngineConfig."""

import argparse
from pathlib import Path
from typing import Any

from s1engine.config import EngineConfig
from s1engine.errors import RequestError
from s1engine.flags import given_values


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of EngineConfig that are on the command line. Raises RequestError if
    ``--served-model-name`` was followed by the model, which it takes for one more name."""
    options = {k: v for k, v in given_values(args, EngineConfig).items() if v is not None}
    names = options.get("served_model_name", ())
    if "model" not in options and len(names) > 1 and ("/" in names[-1] or Path(names[-1]).exists()):
        raise RequestError(
            f"served_model_name: {names[-1]} is a model; write it before the flag",
            param="served_model_name",
        )
    return options
