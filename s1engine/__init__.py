"""Inference engine for reasoning models, with budget forcing inside the scheduler.

The names below are the public API. They load on first use: ``import s1engine`` is cheap and does
not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s1engine.config import EngineConfig
    from s1engine.engine.async_engine import AsyncLLMEngine
    from s1engine.engine.llm import LLM
    from s1engine.engine.llm_engine import LLMEngine
    from s1engine.errors import RequestError
    from s1engine.sampling_params import SamplingParams, ThinkingBudget

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLMEngine",
    "EngineConfig",
    "LLMEngine",
    "RequestError",
    "SamplingParams",
    "ThinkingBudget",
    "__version__",
]

_MODULE_OF = {
    "LLM": "s1engine.engine.llm",
    "LLMEngine": "s1engine.engine.llm_engine",
    "AsyncLLMEngine": "s1engine.engine.async_engine",
    "EngineConfig": "s1engine.config",
    "SamplingParams": "s1engine.sampling_params",
    "ThinkingBudget": "s1engine.sampling_params",
    "RequestError": "s1engine.errors",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
