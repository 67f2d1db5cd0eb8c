"""The tokenizer of a model directory: from its JSON files, else as transformers loads it.

transformers before 5.23 loads a byte-level tokenizer that is declared as Llama's with Llama's rules
for spaces, and loses them (transformers#45488, #46710, #48206). A probe text shows such a loss;
then tokenizer.json's own rules are used. Executes no code of the directory.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from s1engine.checks import shown
from s1engine.errors import ModelError
from s1engine.gguf_file import SUFFIX
from s1engine.gguf_tokenizer import load_gguf_tokenizer, read_gguf_tokenizer
from s1engine.tokenizer_json import read_tokenizer_json

_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "tekken.json"),
    *("spiece.model", "sentencepiece.bpe.model"),
)
"""Files of which a tokenizer needs one: transformers makes an empty one without."""
MAX_GROWTH = 64  # of a text, by all replacements of a tokenizer
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
        with _no_panic(path):
            read = read_gguf_tokenizer if path.suffix == SUFFIX else read_tokenizer_json
            parts = read(path)
            files = cls.read_by_transformers(path) if parts is None else cls(*parts)
            _round_trip(path, files.backend)
        if files.backend.get_vocab_size(with_added_tokens=False) == 0:
            raise ModelError(f"{path}: the tokenizer has no tokens")
        return files

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


def _check_growth(path: Path, backend: tokenizers.Tokenizer) -> None:
    """Raises ModelError for rules that make a text many times longer."""
    growth = 1
    for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
        for content in _replacements(json.loads(part.__getstate__())) if part else ():
            growth *= max(len(content), 1)
    if backend.post_processor is not None:
        state = backend.post_processor.__getstate__().decode()
        growth *= max(state.count('"Sequence":{"id"') // 3, 1)  # one, and two of a pair
    if growth > MAX_GROWTH:
        raise ModelError(f"{path}: the tokenizer replaces text by text {growth} times as long")


def _replacements(rules: Any) -> Iterator[str]:
    """What the rules of a normalizer or decoder write in place of a match."""
    if isinstance(rules, dict):
        if isinstance(rules.get("content"), str):
            yield rules["content"]
        rules = list(rules.values())
    if isinstance(rules, list):
        for rule in rules:
            yield from _replacements(rule)


@contextmanager
def _no_panic(path: Path) -> Iterator[None]:
    """A panic of the tokenizers library, which is no Exception, becomes a ModelError."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{path}: the tokenizer is damaged: {reason}") from error


def _load(path: Path) -> Any:
    from transformers import AutoTokenizer  # this import takes two seconds

    if path.suffix == SUFFIX:
        return load_gguf_tokenizer(path)
    if not any(next(path.glob(name), None) for name in _VOCABULARIES):
        raise ModelError(f"{path / 'tokenizer.json'}: no such file, nor any other vocabulary")
    return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)


def _checked(backend: tokenizers.Tokenizer, file: Path) -> tokenizers.Tokenizer:
    """``backend``, or what ``file`` says where ``backend`` loses text that ``file`` keeps.

    Raises ModelError if the two differ and neither keeps the text, or if their tokens differ.
    """
    if not file.exists():
        return backend
    text, ids = _round_trip(file, backend)
    try:
        own = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{file}: cannot be loaded: {error}") from error
    own_text, own_ids = _round_trip(file, own)
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
            f"{file}: loses text ({shown(own_text)}), and transformers loses other text"
        )
    logger.warning("%s: transformers loses text with this tokenizer; its own rules are used", file)
    return _completed(own, backend, file)


def _round_trip(path: Path, backend: tokenizers.Tokenizer) -> tuple[str, list[int]]:
    """PROBE encoded and decoded, and its ids. Raises ModelError if that fails, or could take
    endless time."""
    _check_growth(path, backend)
    try:
        backend.encode("")
        ids = backend.encode(PROBE, add_special_tokens=False).ids
        return backend.decode(ids, skip_special_tokens=False), ids
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{path}: the tokenizer cannot encode text: {error}") from error


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
