"""The tokenizer of a model directory: from its JSON files, else as transformers loads it.

transformers before 5.23 loads a byte-level tokenizer that is declared as Llama's with Llama's rules
for spaces, and loses them (transformers#45488, #46710, #48206). A probe text shows such a loss;
then tokenizer.json's own rules are used. Executes no code of the directory.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from s1engine.errors import ModelError
from s1engine.gguf_file import SUFFIX
from s1engine.gguf_tokenizer import load_gguf_tokenizer, read_gguf_tokenizer
from s1engine.tokenizer_json import read_tokenizer_json

PROBE = "Two  spaces, a\ttab;\n1234 + 5 = 1239, it's naïve: 你好 🙂\ndef f(x):\n    return x"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the files of a tokenizer hold."""

    backend: tokenizers.Tokenizer
    templates: Mapping[str, str]
    """Chat templates by name; a single one is ``default``."""
    special_tokens: Mapping[str, str]
    """Special tokens by name, such as ``eos_token``."""

    @classmethod
    def read(cls, path: Path) -> "TokenizerFiles":
        """Reads a model directory or a GGUF file. Raises ModelError."""
        read = read_gguf_tokenizer if path.suffix == SUFFIX else read_tokenizer_json
        parts = read(path)
        return cls.read_by_transformers(path) if parts is None else cls(*parts)

    @classmethod
    def read_by_transformers(cls, path: Path) -> "TokenizerFiles":
        """The same, as transformers loads it: slow, for any directory. Raises ModelError."""
        try:
            loaded = _load(path)
        except ModelError:
            raise
        except Exception as error:  # transformers passes on any error of its parsers
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(f"{path}: the tokenizer cannot be loaded: {reason}") from error
        if not loaded.is_fast:
            raise ModelError(f"{path}: only fast tokenizers are supported")
        named = {k: str(v) for k, v in loaded.special_tokens_map.items() if isinstance(v, str)}
        templates = loaded.chat_template or {}
        if isinstance(templates, str):
            templates = {"default": templates}
        return cls(_checked(loaded.backend_tokenizer, path / "tokenizer.json"), templates, named)


def _load(path: Path) -> Any:
    from transformers import AutoTokenizer  # this import takes two seconds

    if path.suffix == SUFFIX:
        return load_gguf_tokenizer(path)
    return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)


def _checked(backend: tokenizers.Tokenizer, file: Path) -> tokenizers.Tokenizer:
    """``backend``, or what ``file`` says where ``backend`` loses text that ``file`` keeps.

    Raises ModelError if the two differ and neither keeps the text, or if their tokens differ.
    """
    if not file.exists():
        return backend
    text, ids = _round_trip(backend)
    try:
        own = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{file}: cannot be loaded: {error}") from error
    own_text, own_ids = _round_trip(own)
    if text in (PROBE, own_text):
        if ids != own_ids:
            logger.warning(
                "%s: transformers splits text in other tokens than the file alone; "
                "tokenizer_config.json changes its rules",
                file,
            )
        return backend
    if own_text != PROBE:
        raise ModelError(
            f"{file}: loses text ({own_text!r} of {PROBE!r}), and transformers loses other text"
        )
    logger.warning("%s: transformers loses text with this tokenizer; its own rules are used", file)
    return _completed(own, backend, file)


def _round_trip(backend: tokenizers.Tokenizer) -> tuple[str, list[int]]:
    ids = backend.encode(PROBE, add_special_tokens=False).ids
    return backend.decode(ids, skip_special_tokens=False), ids


def _completed(
    own: tokenizers.Tokenizer, loaded: tokenizers.Tokenizer, file: Path
) -> tokenizers.Tokenizer:
    """``own`` with the added tokens and the post-processor of ``loaded``, which come from
    tokenizer_config.json as well."""
    for token_id, token in sorted(loaded.get_added_tokens_decoder().items()):
        if own.token_to_id(token.content) is None:
            own.add_tokens([token])
        if own.token_to_id(token.content) != token_id:
            raise ModelError(f"{file}: the added token {token.content!r} has not the id {token_id}")
    if loaded.post_processor is not None:
        own.post_processor = loaded.post_processor
    return own
