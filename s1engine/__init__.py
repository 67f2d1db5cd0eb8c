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
    from s1engine.engine.prefix import PinnedPrefix
    from s1engine.engine.request_output import StreamEvent
    from s1engine.engine.request_stream import RequestStream
    from s1engine.engine.session import RestoredSession
    from s1engine.errors import (
        EngineDeadError,
        ModelError,
        RequestError,
        RequestFailedError,
        TryAgainError,
    )
    from s1engine.options import EngineOptions, Message, Prompt, RequestOptions
    from s1engine.outputs import (
        CheckpointOutput,
        Chunk,
        CompletionOutput,
        RequestOutput,
        ThinkingUsage,
        Timing,
        TokenLogprob,
        Usage,
    )
    from s1engine.sampling_params import SamplingParams, ThinkingBudget

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLMEngine",
    "CheckpointOutput",
    "Chunk",
    "CompletionOutput",
    "EngineConfig",
    "EngineDeadError",
    "EngineOptions",
    "LLMEngine",
    "Message",
    "ModelError",
    "PinnedPrefix",
    "Prompt",
    "RequestError",
    "RequestFailedError",
    "RequestOptions",
    "RequestOutput",
    "RequestStream",
    "RestoredSession",
    "SamplingParams",
    "StreamEvent",
    "ThinkingBudget",
    "ThinkingUsage",
    "Timing",
    "TokenLogprob",
    "TryAgainError",
    "Usage",
    "__version__",
]

_NAMES = {
    "s1engine.config": ("EngineConfig",),
    "s1engine.engine.async_engine": ("AsyncLLMEngine",),
    "s1engine.engine.llm": ("LLM",),
    "s1engine.engine.llm_engine": ("LLMEngine",),
    "s1engine.engine.prefix": ("PinnedPrefix",),
    "s1engine.engine.request_output": ("StreamEvent",),
    "s1engine.engine.request_stream": ("RequestStream",),
    "s1engine.engine.session": ("RestoredSession",),
    "s1engine.errors": (
        "EngineDeadError",
        "ModelError",
        "RequestError",
        "RequestFailedError",
        "TryAgainError",
    ),
    "s1engine.options": ("EngineOptions", "Message", "Prompt", "RequestOptions"),
    "s1engine.outputs": (
        "CheckpointOutput",
        "Chunk",
        "CompletionOutput",
        "RequestOutput",
        "ThinkingUsage",
        "Timing",
        "TokenLogprob",
        "Usage",
    ),
    "s1engine.sampling_params": ("SamplingParams", "ThinkingBudget"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
