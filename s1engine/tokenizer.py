"""Text to token ids and back, whole or incrementally.

Uses the ``tokenizers`` object inside of transformers': it keeps no state between calls, so any
thread may encode. Special strings in a text become special tokens, as s1's delimiters must.
Knows nothing of thinking.
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from s1engine.chat_template import ChatTemplate
from s1engine.errors import ModelError, RequestError
from s1engine.tokenizer_files import TokenizerFiles

REPLACEMENT = "\ufffd"  # a decoder's sign for an unfinished or broken character
MAX_TOKENS = 2**24  # ids of a tokenizer; the largest vocabularies have a quarter of a million
MAX_PHRASES = 256  # recurring texts whose ids are kept
MAX_PHRASE_CHARS = 256  # of one of them
MAX_WINDOW = 64  # ids without the end of a character before they count as broken


class Tokenizer:
    """The tokenizer of one model.

    Args:
        backend: encodes and decodes.
        chat_template: Jinja text, or several by name: ``default``, and ``tool_use`` for requests
            with tools. None if the model has none.
        special_tokens: special tokens by name, such as ``eos_token``.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        named = dict(special_tokens or {})
        sources = {"default": chat_template} if isinstance(chat_template, str) else chat_template
        self._templates = {
            name: ChatTemplate(source, named)
            for name, source in (sources or {}).items()
            if name in ("default", "tool_use")
        }
        end = named.get("eos_token")
        self.eos_token_id: int | None = None if end is None else backend.token_to_id(end)
        """The id of ``eos_token``; None if there is none."""
        bos = named.get("bos_token")
        added = backend.encode("").ids
        self._adds_bos = bos is not None and added[:1] == [backend.token_to_id(bos)]
        self._special_ids = frozenset(
            i for i, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.visible_bytes: Mapping[int, bytes] = _VisibleBytes(self)
        """``token_bytes`` by id, but empty for special tokens."""
        vocabulary = backend.get_vocab()
        self.num_tokens: int = max(vocabulary.values()) + 1
        """The largest id plus one; a model's embedding may have more rows."""
        if self.num_tokens > MAX_TOKENS:
            raise RequestError(
                f"the tokenizer has the id {self.num_tokens - 1}: above {MAX_TOKENS}"
            )
        self.max_token_chars: int = max(map(len, vocabulary))
        """Length of the longest token, in characters (bytes if ``is_byte_level``)."""
        self.is_byte_level: bool = isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
        """True if the text of ids is the concatenation of their bytes."""
        self._phrases = lru_cache(MAX_PHRASES)(lambda text: tuple(self.encode(text)))
        self.newline_ids: list[int] = self._find_newlines(vocabulary)
        """Ids whose text ends in a newline, ascending."""
        self.newlines = np.zeros(self.num_tokens, np.uint8)
        """The same as one flag per id, [num_tokens] uint8."""
        self.newlines[self.newline_ids] = 1

    @classmethod
    def from_dir(cls, path: Path, chat_template: str | None = None) -> "Tokenizer":
        """Loads the tokenizer of a model directory or a GGUF file. ``chat_template`` is the path of
        a Jinja file that replaces the model's templates. Raises ModelError, or RequestError for
        that file. Code in the directory is never executed."""
        files = TokenizerFiles.read(path)
        if chat_template is not None:
            return cls(files.backend, _read(chat_template), files.special_tokens)
        try:
            return cls(files.backend, files.templates, files.special_tokens)
        except RequestError as error:
            raise ModelError(f"{path}: {error}") from error

    def num_plain_tokens(self) -> int:
        """The largest id plus one, without the tokens that were added to the vocabulary."""
        return max(self._backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1

    def _find_newlines(self, vocabulary: dict[str, int]) -> list[int]:
        endings = ("Ċ", "\n", "<0x0A>")  # byte-level, plain, and byte-fallback spelling
        candidates = [i for token, i in vocabulary.items() if token.endswith(endings)]
        return sorted(i for i in candidates if self.decode([i]).endswith("\n"))

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without added tokens before or after. Raises RequestError if ``text`` is
        not valid Unicode."""
        return self._encode(text, add_special_tokens=False)

    def encode_phrase(self, text: str) -> tuple[int, ...]:
        """The same for a text that recurs in requests; short ones are kept."""
        if len(text) > MAX_PHRASE_CHARS:
            return tuple(self.encode(text))
        return self._phrases(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a raw prompt, with the tokens that the tokenizer adds, such as the beginning of
        text; one that ``text`` itself begins with is not repeated. Raises RequestError."""
        ids = self._encode(text, add_special_tokens=True)
        return ids[1:] if self._adds_bos and ids[:1] == ids[1:2] else ids

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            # A batch of one: unlike ``encode`` it releases the GIL, and it skips offsets.
            batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError("text holds a lone surrogate, which no encoding knows") from error
        except BaseException as error:  # a panic of the library, which is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise RequestError("the tokenizer's regular expressions fail on this text") from error
        return batch[0].ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; broken characters become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def to_json(self) -> str:
        """The whole tokenizer, in the format of ``tokenizer.json``."""
        return self._backend.to_str()

    def single_token_id(self, token: str) -> int | None:
        """Id of ``token`` if any text encodes it as one token; else None."""
        token_id = self._backend.token_to_id(token)
        return token_id if token_id is not None and self.encode(token) == [token_id] else None

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token, which may be part of a character. A special token gives its
        name, an id without a token gives nothing."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._special_ids:
            return token.encode()
        if self.is_byte_level:
            return _from_byte_level(token)
        return self.fallback_byte(token_id) or self.decode([token_id]).encode()

    def fallback_byte(self, token_id: int) -> bytes:
        """The byte that an id of a byte-fallback vocabulary stands for; empty for other ids."""
        token = self._backend.id_to_token(token_id)
        match = None if self.is_byte_level or token is None else _FALLBACK.fullmatch(token)
        is_byte = match is not None and self.decode([token_id]) != token
        return bytes.fromhex(match[1]) if match is not None and is_byte else b""

    def token_string(self, token_id: int) -> str:
        """A token as the vocabulary spells it; an id without a token gives nothing."""
        return self._backend.id_to_token(token_id) or ""

    def is_special(self, token_id: int) -> bool:
        """True if ``token_id`` is left out of text."""
        return token_id in self._special_ids

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        enable_thinking: bool | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Text of a chat, by default up to the header of the assistant's next turn;
        ``template_kwargs`` are further variables of the template.

        Raises RequestError naming ``messages``, ``tools`` or ``chat_template``.
        """
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
            raise RequestError(
                "this model has no chat template, or none named default", param="messages"
            )
        options = dict(template_kwargs or {})
        if enable_thinking is not None:
            options["enable_thinking"] = enable_thinking
        return template.render(
            messages,
            options,
            tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    @property
    def template_source(self) -> str:
        """Jinja text of the chat template; empty if the model has none."""
        template = self._templates.get("default")
        return "" if template is None else template.source

    @property
    def tools_template(self) -> str:
        """Jinja text of the chat template for requests with tools; empty if it knows none."""
        template = self._templates.get("tool_use") or self._templates.get("default")
        return template.source if template is not None and template.knows_tools else ""


class _VisibleBytes(dict[int, bytes]):
    """Filled on first use of an id: most of a large vocabulary is never seen."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> bytes:
        tokenizer = self._tokenizer
        value = b"" if tokenizer.is_special(token_id) else tokenizer.token_bytes(token_id)
        self[token_id] = value
        return value


def _read(chat_template: str) -> str:
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        message = f"chat_template {chat_template}: {error}"
        raise RequestError(message, param="chat_template") from error


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character in a byte-level vocabulary: printable Latin-1 characters are their
    own byte, the other bytes are written as characters 256, 257, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_FALLBACK = re.compile("<0x([0-9A-F]{2})>")


def _from_byte_level(token: str) -> bytes:
    if all(char in _BYTE_OF for char in token):
        return bytes(_BYTE_OF[char] for char in token)
    return token.encode()  # an added token, which the vocabulary holds as plain text


class _Decoder(Protocol):
    """Decodes ids incrementally."""

    def push(self, ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...


class IncrementalDetokenizer:
    """Text of a growing sequence of ids, without special tokens except those of ``shown``.

    The pieces join to the decoding of the whole, and none ends inside a character. (Byte-fallback
    vocabularies decode broken bytes differently once more follow; text already returned stays.)
    """

    def __init__(self, tokenizer: Tokenizer, shown: Iterable[int] = ()) -> None:
        decoder = _ByteDecoder if tokenizer.is_byte_level else _WindowDecoder
        self._decoder: _Decoder = decoder(tokenizer)
        self._shown = {token_id: tokenizer.token_string(token_id) for token_id in shown}

    def push(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` complete: maybe empty, never half a character."""
        if not self._shown or self._shown.keys().isdisjoint(ids):
            return self._decoder.push(ids)
        text, begin = "", 0
        for at, token_id in enumerate(ids):
            if token_id in self._shown:
                text += self._decoder.push(ids[begin:at]) + self._decoder.flush()
                text, begin = text + self._shown[token_id], at + 1
        return text + self._decoder.push(ids[begin:])

    def flush(self) -> str:
        """The rest: U+FFFD for an unfinished character, else empty."""
        return self._decoder.flush()


class _ByteDecoder:
    """For byte-level vocabularies: one table look-up per token and an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.visible_bytes.__getitem__
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(b"".join(map(self._bytes_of, ids)))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _WindowDecoder:
    """For any vocabulary: decodes the latest ids again, together with some before them.

    context    ids whose text was returned; they decide how the next text begins
    pending    later ids, whose text was not returned
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
        return "" if unfinished and len(self._pending) < MAX_WINDOW else self._accept(text)

    def flush(self) -> str:
        return self._accept(self._text())

    def _text(self) -> str:
        before = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._pending)[len(before) :]

    def _accept(self, text: str) -> str:
        """Returns ``text``; the pending ids become the context of what follows."""
        if text:
            self._context = self._pending
        self._pending = []
        return text
