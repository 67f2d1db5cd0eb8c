"""Flags of vLLM, SGLang and llama.cpp on the command line of ``serve``.

Those that ask for what the server does anyway pass, with a note. The others are errors that name
the flag of ours, if there is one.
"""

import argparse
import logging
from typing import Any

from s1engine.config import REASONING_FORMATS

ANYWAY = (
    "--enable-auto-tool-choice",
    "--enable-chunked-prefill",
    "--enable-reasoning",
    "--disable-log-requests",
    "--no-enable-log-requests",
    "--disable-log-stats",
    "--enable-prompt-tokens-details",
    "--enable-metrics",
    "--enable-cache-report",
    "--jinja",
    "--metrics",
    "--cont-batching",
)
"""Without a value."""
ANYWAY_WITH_VALUE = ("--swap-space", "--max-seq-len-to-capture", "--log-level", "--threads-http")
OURS = {
    "-m": "MODEL, without a flag",
    "--model": "MODEL, without a flag",
    "--model-path": "MODEL, without a flag",
    "--hf-repo": "MODEL, without a flag",
    "-c": "--max-model-len",
    "--ctx-size": "--max-model-len",
    "--context-length": "--max-model-len",
    "-np": "--max-num-seqs",
    "--parallel": "--max-num-seqs",
    "--max-running-requests": "--max-num-seqs",
    "--mem-fraction-static": "--gpu-memory-utilization",
    "--tp": "--tensor-parallel-size",
    "--tp-size": "--tensor-parallel-size",
    "--dp": "--replicas",
    "--data-parallel-size": "--replicas",
    "--alias": "--served-model-name",
    "--reasoning-budget": "--max-thinking-token-budget",
    "--disable-radix-cache": "--no-enable-prefix-caching",
    "--cors-allow-origins": "--allowed-origins",
    "--api-key-path": "--api-key-file",
}
"""Flags that mean one of ours."""
PARSERS = {
    **{name: name for name in REASONING_FORMATS},
    "deepseek_r1": "think-tag",
    "deepseek-r1": "think-tag",
    "qwen3": "think-tag",
    "qwen3-thinking": "think-tag",
    "glm45": "think-tag",
    "olmo3": "think-tag",
    "seed_oss": "seed-oss",
    "openai_gptoss": "gpt-oss",
    "gpt_oss": "gpt-oss",
}
"""Reasoning formats by the names of vLLM's and SGLang's parsers."""
logger = logging.getLogger(__name__)


def add_other_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, which ``--help`` leaves out."""
    for flag in ANYWAY:
        parser.add_argument(flag, action=_Noted, nargs=0, help=argparse.SUPPRESS)
    for flag in ANYWAY_WITH_VALUE:
        parser.add_argument(flag, action=_Noted, help=argparse.SUPPRESS)
    for flag, ours in OURS.items():
        refuse = _refusing(f"s1engine has {ours}")
        parser.add_argument(flag, action=refuse, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--reasoning-parser", action=_ReasoningParser, help=argparse.SUPPRESS)


class _Noted(argparse.Action):
    def __init__(self, option_strings: Any, dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        logger.warning("%s has no effect here: the server does so anyway, or needs it not", option)


class _ReasoningParser(_Noted):
    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        if values not in PARSERS:
            known = ", ".join(sorted(PARSERS))
            parser.error(f"argument {option}: {values!r} is not known; known: {known}")
        namespace.reasoning_format = PARSERS[values]
        logger.warning("%s %s is --reasoning-format %s here", option, values, PARSERS[values])


def _refusing(hint: str) -> type[argparse.Action]:
    class Refused(_Noted):
        def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
            parser.error(f"argument {option} is of another engine: {hint}")

    return Refused
