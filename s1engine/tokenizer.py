"""Text to token ids and back, whole or as it grows.

Loads with transformers, works on the ``tokenizers`` object inside: that one keeps no state between
calls, so any thread may encode. Special strings inside a text become special tokens, as s1's
delimiters must. Knows nothing of thinking.
"""

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from s1engine.chat_template import ChatTemplate
from s1engine.errors import ModelError, RequestError

REPLACEMENT = "\ufffd"  # how a decoder shows an unfinished or broken character
MAX_WINDOW = 64  # ids without a clean end of a character, after which they are taken as broken


class Tokenizer:
    """The tokenizer of one model.

    Args:
        backend: what encodes and decodes.
        chat_template: Jinja text, None if the model has none.
        special_tokens: named special tokens, among them ``eos_token``.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        named = dict(special_tokens or {})
        self._template = ChatTemplate(chat_template, named) if chat_template else None
        self._special_ids = frozenset(
            i for i, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.visible_bytes: Mapping[int, bytes] = _VisibleBytes(self)
        """``token_bytes`` of ids, but empty for special tokens."""
        vocabulary = backend.get_vocab()
        self.num_tokens: int = max(vocabulary.values()) + 1
        """The last id plus one; a model's embedding may have more rows."""
        self.max_token_chars: int = max(map(len, vocabulary))
        """Length of the longest token, in characters (bytes if ``is_byte_level``)."""
        self.is_byte_level: bool = isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
        """Does the text of ids consist of their bytes one after another?"""
        self.newline_ids: list[int] = self._find_newlines(vocabulary)
        """Ids whose text ends in a newline, ascending."""
        self.newlines = np.zeros(self.num_tokens, np.uint8)
        """The same as a flag for each id."""
        self.newlines[self.newline_ids] = 1

    @classmethod
    def from_dir(cls, path: Path, chat_template: str | None = None) -> "Tokenizer":
        """Loads the tokenizer of a model directory; ``chat_template`` is the path of a Jinja file
        that replaces its own template. Raises ModelError, or RequestError for that file. Code in
        the directory is never run."""
        from transformers import AutoTokenizer  # two seconds

        try:
            loaded = AutoTokenizer.from_pretrained(
                str(path), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # transformers raises whatever its parsers raise
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(f"{path}: the tokenizer cannot be loaded: {reason}") from error
        if not loaded.is_fast:
            raise ModelError(f"{path}: only fast tokenizers are supported")
        named = {k: str(v) for k, v in loaded.special_tokens_map.items() if isinstance(v, str)}
        if chat_template is not None:
            return cls(loaded.backend_tokenizer, _read(chat_template), named)
        template = loaded.chat_template
        if isinstance(template, dict):  # several, by name
            template = template.get("default")
        try:
            return cls(loaded.backend_tokenizer, template, named)
        except RequestError as error:
            raise ModelError(f"{path}: {error}") from error

    def _find_newlines(self, vocabulary: dict[str, int]) -> list[int]:
        endings = ("Ċ", "\n", "<0x0A>")  # byte-level, plain, and byte-fallback spelling
        likely = [i for token, i in vocabulary.items() if token.endswith(endings)]
        return sorted(i for i in likely if self.decode([i]).endswith("\n"))

    @property
    def has_chat_template(self) -> bool:
        """Can chats be rendered?"""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; nothing is added before or after. Raises RequestError if ``text`` is not
        valid Unicode."""
        try:
            # A batch of one: unlike ``encode`` it lets other threads run, and it skips offsets.
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError("text holds a lone surrogate, which no encoding knows") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; broken characters become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def to_json(self) -> str:
        """The whole tokenizer, in the format of ``tokenizer.json``."""
        return self._backend.to_str()

    def single_token_id(self, token: str) -> int | None:
        """Id of ``token`` if it is one token wherever it stands; else None."""
        found = self._backend.token_to_id(token)
        return found if found is not None and self.encode(token) == [found] else None

    def ends_with_newline(self, token_id: int) -> bool:
        """Does the text of ``token_id`` end in a newline?"""
        return self.decode([token_id]).endswith("\n")

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token, which may be a part of a character; special tokens are spelled
        out. Empty for an id without a token."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._special_ids:
            return token.encode()
        return _from_byte_level(token) if self.is_byte_level else self.decode([token_id]).encode()

    def is_special(self, token_id: int) -> bool:
        """Is ``token_id`` left out of text?"""
        return token_id in self._special_ids

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        enable_thinking: bool | None = None,
        template_kwargs: dict[str, Any] | None = None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> str:
        """Text of a chat up to the header of the assistant's next turn.

        Raises RequestError naming ``messages``, ``tools`` or ``chat_template``.
        """
        if self._template is None:
            raise RequestError("this model has no chat template", param="messages")
        options = dict(template_kwargs or {})
        if enable_thinking is not None:
            options["enable_thinking"] = enable_thinking
        return self._template.render(messages, options, tools)


class _VisibleBytes(dict[int, bytes]):
    """Filled as ids turn up, for a vocabulary is large and most of it is never seen."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> bytes:
        tokenizer = self._tokenizer
        found = b"" if tokenizer.is_special(token_id) else tokenizer.token_bytes(token_id)
        self[token_id] = found
        return found


def _read(chat_template: str) -> str:
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        message = f"chat_template {chat_template}: {error}"
        raise RequestError(message, param="chat_template") from error


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level vocabularies spell bytes: printable Latin-1 ones stand for
    themselves, the others for 256, 257, ..."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    spelled = {chr(byte): byte for byte in plain}
    return spelled | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _from_byte_level(token: str) -> bytes:
    if all(char in _BYTE_OF for char in token):
        return bytes(_BYTE_OF[char] for char in token)
    return token.encode()  # an added token, which stands in the vocabulary as plain text


class _Stream(Protocol):
    """Turns ids into text piece by piece."""

    def push(self, ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...


class IncrementalDetokenizer:
    """Text of a growing sequence of ids, special tokens left out.

    The pieces join to the decoding of the whole, and none ends inside a character. (Where decoding
    looks back, as byte-fallback vocabularies do over broken bytes, what was shown stays shown.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        stream = _ByteStream if tokenizer.is_byte_level else _WindowStream
        self._stream: _Stream = stream(tokenizer)

    def push(self, ids: Sequence[int]) -> str:
        """Text that ``ids`` complete; may be empty, never half a character."""
        return self._stream.push(ids)

    def flush(self) -> str:
        """What is left: an unfinished character, as U+FFFD."""
        return self._stream.flush()


class _ByteStream:
    """For byte-level vocabularies: a table look-up a token and a UTF-8 decoder with memory."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.visible_bytes.__getitem__
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(b"".join(map(self._bytes_of, ids)))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _WindowStream:
    """For any vocabulary: decodes the latest ids again, behind some whose text is out already.

    context    ids whose text was shown; they settle how the next one begins
    pending    ids since, whose text is not shown
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        self._pending.extend(ids)
        text = self._text()
        unfinished = not text or text.endswith(REPLACEMENT)
        return "" if unfinished and len(self._pending) < MAX_WINDOW else self._settle(text)

    def flush(self) -> str:
        return self._settle(self._text())

    def _text(self) -> str:
        before = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._pending)[len(before) :]

    def _settle(self, text: str) -> str:
        """Shows ``text``, whose ids become the context of what follows."""
        if text:
            self._context = self._pending
        self._pending = []
        return text
