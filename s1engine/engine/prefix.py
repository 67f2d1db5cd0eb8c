"""Prefixes that stay computed: the leading tokens of prompts, pinned in the prefix cache.

A prefix is computed by a request that pins its blocks as it ends, between two steps. Only whole
blocks are kept. Runs on any thread; the engine's thread does what concerns its cache.
"""

import weakref
from typing import Self

import numpy as np
from numpy.typing import NDArray

from s1engine.engine.core_output import sequence_id
from s1engine.engine.embedded import EmbeddedEngine
from s1engine.engine.engine_thread import EngineThread
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.request import Request
from s1engine.engine.request_stream import RequestStream
from s1engine.errors import RequestError, RequestFailedError
from s1engine.options import Prompt, RequestOptions
from s1engine.outputs import RequestOutput
from s1engine.runner.resolved_config import ResolvedConfig
from s1engine.sampling_params import SamplingParams

_ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


class PinnedPrefix:
    """The leading tokens of a prompt, whose KV blocks stay in the prefix cache until ``release``.

    The end of a ``with`` block and the garbage collection release it too. After that the blocks
    stay cached until others need the memory.
    """

    def __init__(self, thread: EngineThread, pin_id: int, token_ids: list[int]) -> None:
        self.token_ids = token_ids
        """The pinned tokens: whole blocks."""
        self._release = weakref.finalize(self, _unpin, thread, pin_id)
        self._release.atexit = False

    @property
    def num_tokens(self) -> int:
        """Number of pinned tokens."""
        return len(self.token_ids)

    def release(self) -> None:
        """Lets the cache evict the blocks. Never waits; does nothing the second time."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def prefill(
    owner: EmbeddedEngine, prompt: Prompt | RequestOutput, options: RequestOptions
) -> PinnedPrefix:
    """Computes the whole blocks of a prompt and pins them; see ``LLM.prefill``."""
    thread, compiler = owner.thread, owner.compiler
    config = thread.engine.config
    check_prefix_caching(config)
    ids = prefix_token_ids(owner, prompt, options)
    whole = ids[: len(ids) // config.block_size * config.block_size]
    if not whole:
        raise RequestError(
            f"prompt has {len(ids)} tokens; a prefix is kept in whole blocks of "
            f"{config.block_size}",
            param="prompt",
        )
    kept: RequestOptions = {"cache_salt": options.get("cache_salt"), "enable_thinking": False}
    kept["request_id"], kept["priority"] = options.get("request_id"), options.get("priority", 0)
    request = compiler.compile(whole, _ONE_TOKEN, **kept)
    request.pin = True
    pin_id = sequence_id(request.number, 0)
    pinned = PinnedPrefix(thread, pin_id, whole)
    try:
        thread.call(lambda engine: check_room(engine, request.prompt, request.salt, "prompt"))
        _run(owner, thread, request)
        if thread.call(lambda engine: engine.scheduler.num_pinned(pin_id)) == 0:
            thread.call(lambda engine: check_room(engine, request.prompt, request.salt, "prompt"))
            raise RequestFailedError("the prefix was computed, but other pins took the room")
    except BaseException:
        pinned.release()
        raise
    return pinned


def prefix_token_ids(
    owner: EmbeddedEngine, prompt: Prompt | RequestOutput, options: RequestOptions
) -> list[int]:
    """All tokens of a prompt, or of a finished request with one sample. Raises RequestError."""
    if not isinstance(prompt, RequestOutput):
        return owner.compiler.prefix_token_ids(prompt, **options)
    if len(prompt.outputs) != 1:
        raise RequestError(
            f"prompt is a request with {len(prompt.outputs)} samples; pass the token ids of one",
            param="prompt",
        )
    return [*prompt.prompt_token_ids, *prompt.outputs[0].token_ids]


def check_prefix_caching(config: ResolvedConfig) -> None:
    """Raises RequestError if the engine keeps no prefixes."""
    if not config.enable_prefix_caching:
        raise RequestError(
            "enable_prefix_caching is off, so no prefix is kept; leave it out",
            param="enable_prefix_caching",
        )


def check_room(engine: LLMEngine, tokens: NDArray[np.int32], salt: bytes, param: str) -> None:
    """Raises RequestError if the blocks of these tokens cannot be pinned beside the others."""
    if engine.scheduler.can_pin(tokens, salt):
        return
    stats, size = engine.scheduler.stats(), engine.config.block_size
    raise RequestError(
        f"{param}: {len(tokens)} tokens cannot be pinned: {stats.num_pinned_blocks * size} of at "
        f"most {stats.max_pinned_blocks * size} are pinned (half the KV cache, and room for one "
        f"request of {engine.max_model_len}); release a prefix, raise kv_cache_memory_gb or lower "
        "max_model_len",
        param=param,
    )


def _run(owner: EmbeddedEngine, thread: EngineThread, request: Request) -> None:
    *_, output = RequestStream(owner, thread, request)
    assert isinstance(output, RequestOutput)
    if output.outputs[0].finish_reason != "length":
        raise RequestFailedError("the prefix was cancelled before it was computed")


def _unpin(thread: EngineThread, pin_id: int) -> None:
    thread.call_async(lambda engine: engine.scheduler.unpin(pin_id))
