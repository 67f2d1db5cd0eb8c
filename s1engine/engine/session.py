"""Sessions that outlive a process: what the prefix cache holds of some tokens, saved and restored.

Files are read and written on the caller's thread; the engine's thread only copies blocks. A session
fits an engine with the same model, computed in the same way: restored blocks are bit for bit those
that this engine would compute.
"""

import hashlib
import itertools
from dataclasses import dataclass, fields

import numpy as np

from s1engine.checks import check_bool, check_path
from s1engine.engine.embedded import EmbeddedEngine
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.prefix import (
    PinnedPrefix,
    check_prefix_caching,
    check_room,
    prefix_token_ids,
)
from s1engine.engine.request_compiler import cache_salt_bytes
from s1engine.engine.session_file import Session, read_session, write_session
from s1engine.errors import RequestError
from s1engine.options import Prompt, RequestOptions, check_request_options
from s1engine.outputs import RequestOutput
from s1engine.runner.kv_blocks import LayerKV, read_blocks, write_blocks

_pin_ids = itertools.count(-1, -1)  # of pins that belong to no request
_NOT_COMPUTED = ("generation_defaults", "eos_token_ids", "dtype_name", "path")  # of ModelFacts


@dataclass(frozen=True, slots=True)
class RestoredSession:
    """A session whose leading tokens are in the prefix cache again."""

    token_ids: list[int]
    """All tokens of the session: a prompt that continues it."""
    num_tokens: int
    """Leading ones that are cached: whole blocks."""
    pinned: PinnedPrefix | None
    """Holds them, if they were to be pinned."""


def save_session(
    owner: EmbeddedEngine,
    prompt: Prompt | RequestOutput,
    path: object,
    options: RequestOptions,
) -> int:
    """Writes a session; returns the number of tokens with KV. See ``LLM.save_session``."""
    file, engine = check_path("path", path), owner.thread.engine
    salt = _salt(options)
    _check_supported(engine)
    ids = prefix_token_ids(owner, prompt, options)
    tokens = np.array(ids, np.int32)

    def read(engine: LLMEngine) -> list[LayerKV]:
        blocks = engine.scheduler.cached_blocks(tokens, salt)
        return read_blocks(engine.runner.kv_cache, blocks) if blocks else []

    kv = owner.thread.call(read)
    if not kv:
        raise RequestError(
            "prompt: none of its blocks is cached; generate or prefill it first", param="prompt"
        )
    session = Session(ids, kv, _identity(engine))
    write_session(file, session)
    return session.num_tokens


def restore_session(
    owner: EmbeddedEngine, path: object, pin: object, options: RequestOptions
) -> RestoredSession:
    """Enters a session into the prefix cache. See ``LLM.restore_session``."""
    file, thread = check_path("path", path), owner.thread
    engine, salt, keep = thread.engine, _salt(options), check_bool("pin", pin)
    _check_supported(engine)
    session = read_session(file)
    _check_fits(file, session, engine)
    size = engine.config.block_size
    whole = session.token_ids[: session.num_tokens // size * size]
    pin_id = next(_pin_ids)
    pinned = PinnedPrefix(thread, pin_id, whole) if keep else None
    try:
        thread.call(lambda engine: _restore(engine, file, session, whole, salt, pin_id, keep))
    except BaseException:
        if pinned is not None:
            pinned.release()
        raise
    return RestoredSession(session.token_ids, len(whole), pinned)


def _restore(
    engine: LLMEngine,
    path: str,
    session: Session,
    whole: list[int],
    salt: bytes,
    pin_id: int,
    keep: bool,
) -> None:
    tokens, size = np.array(whole, np.int32), engine.config.block_size
    if keep:
        check_room(engine, tokens, salt, "path")

    def fill(first: int, blocks: list[int]) -> None:
        write_blocks(engine.runner.kv_cache, blocks, session.kv, first * size)

    if not engine.scheduler.restore(tokens, salt, fill):
        free = engine.scheduler.stats().num_free_blocks * size
        raise RequestError(
            f"{path}: the session has {len(whole)} tokens, and {free} of "
            f"{engine.runner.num_blocks * size} in the KV cache are free; restore it later, or "
            "raise kv_cache_memory_gb",
            param="path",
        )
    if keep:
        pinned = engine.scheduler.pin(pin_id, tokens, salt)
        assert pinned, "there was room for the pin"


def _salt(options: RequestOptions) -> bytes:
    return cache_salt_bytes(check_request_options(options).get("cache_salt"))


def _check_supported(engine: LLMEngine) -> None:
    check_prefix_caching(engine.config)
    ranks = engine.config.tensor_parallel_size
    if ranks > 1:
        raise RequestError(
            f"tensor_parallel_size {ranks}: sessions are saved and restored by engines of one "
            "rank only",
            param="tensor_parallel_size",
        )


def _check_fits(path: str, session: Session, engine: LLMEngine) -> None:
    """Raises RequestError, which names the field that differs, unless the engine would compute the
    same K and V for the same tokens."""
    for name, own in _identity(engine).items():
        stored = session.identity.get(name)
        if stored != own:
            raise RequestError(
                f"{path}: {name} is {stored}, of this engine {own}; restore it where it was saved",
                param="path",
            )
    stored_k, own_k = session.kv[0][0], engine.runner.kv_cache.layers[0][0]
    shape = len(session.kv), stored_k.shape[1], stored_k.shape[2]
    wanted = len(engine.runner.kv_cache.layers), own_k.shape[1], own_k.shape[3]
    if shape != wanted or stored_k.dtype is not own_k.dtype:
        message = f"{path}: k and v are {shape} of {stored_k.dtype}, not {wanted} of {own_k.dtype}"
        raise RequestError(message, param="path")
    vocab_size = engine.model_config.vocab_size
    for token in session.token_ids:
        if not 0 <= token < vocab_size:
            message = f"{path}: tokens holds {token}, no token id below {vocab_size}"
            raise RequestError(message, param="path")
    if session.num_tokens < engine.config.block_size:
        raise RequestError(
            f"{path}: the session has {session.num_tokens} tokens with KV, less than a block of "
            f"{engine.config.block_size}",
            param="path",
        )


def _identity(engine: LLMEngine) -> dict[str, str]:
    """All on which K and V of given tokens depend."""
    facts, runner, config = engine.model_config, engine.runner, engine.config
    named = {field.name: getattr(facts, field.name) for field in fields(facts)}
    computed = [(name, named[name]) for name in sorted(named) if name not in _NOT_COMPUTED]
    return {
        "architecture": facts.architecture,
        "implementation": type(facts).__name__,
        "num_layers": str(facts.num_layers),
        "num_kv_heads": str(facts.num_kv_heads),
        "head_dim": str(facts.head_dim),
        "kv_cache_dtype": _name(runner.kv_cache.layers[0][0].dtype),
        "dtype": _name(runner.dtype),
        "quantization": str(config.quantization),
        "model_config": hashlib.sha256(repr(computed).encode()).hexdigest(),
        "weights_digest": engine.weights_digest,
    }


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
