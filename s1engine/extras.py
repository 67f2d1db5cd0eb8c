"""The extras of a plain installation: what each brings, and the error where one is missing.

pyproject.toml names the packages to install; this table names what is imported of them.
"""

import sys
from importlib.util import find_spec

from s1engine.errors import RequestError

EXTRAS = {
    "server": ("fastapi", "httptools", "prometheus_client", "uvicorn", "uvloop"),
    "eval": ("httpx", "math_verify", "matplotlib"),
    "train": ("httpx", "math_verify", "matplotlib", "yaml"),
    "hub": ("datasets",),
    "harness": ("lm_eval",),
    "ray": ("aiohttp", "ray.data", "ray.serve"),
    "otel": ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
}


def require_extra(extra: str, *, param: str | None = None) -> None:
    """Raises RequestError about the field ``param`` if a package of the extra is missing."""
    for module in EXTRAS[extra]:
        if not _is_installed(module):
            raise RequestError(
                f"the package {module.partition('.')[0]} is missing: "
                f"pip install 's1engine[{extra}]'",
                param=param,
            )


def _is_installed(module: str) -> bool:
    """Looks the module up; imports only the packages above it."""
    if sys.modules.get(module.partition(".")[0], module) is None:
        return False  # an import of it fails
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False
