"""The bytes that each token of a sequence adds to its text.

Text as a whole is decoded by ``IncrementalDetokenizer``; here each token stands alone, so that
bytes of a character that two tokens share stay apart. Newlines at the beginning of a text may
belong to the delimiter before it.
"""

from s1engine.engine.end_markers import make_token_bytes
from s1engine.tokenizer import Tokenizer


class TokenText:
    """Tokens of one sequence, in order.

    Attributes:
        has_thinking: a token of the thinking was shown.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_bytes = make_token_bytes(tokenizer)
        self._is_empty = [True, True]  # text of the answer, and of the thinking
        self._is_first = [True, True]  # the next token of each is the first one

    @property
    def has_thinking(self) -> bool:
        return not self._is_empty[True]

    def push(self, token: int, thinking: bool, strips: bool) -> bytes:
        """What the next token shows; ``strips``: without newlines at the beginning of its text."""
        if self._tokenizer.is_special(token):
            return b""
        data = self._token_bytes(token)
        if self._is_first[thinking] and not self._tokenizer.is_byte_level:
            data = self._tokenizer.decode([token]).encode()  # which strips a leading space
        self._is_first[thinking] = False
        if strips and self._is_empty[thinking]:
            data = data.lstrip(b"\n")
        self._is_empty[thinking] &= not data
        return data
