"""Extracts the answer from a model's text and grades it.

Extraction follows s1's harness: the last ``\\boxed{...}`` of the answer, else the text after the
last "Answer:". Grading tries the cheap checks first: integers by value, then the characters, then
math-verify's symbolic comparison. Knows no engines or tasks.
"""

import functools
import re
import threading
from typing import Literal

Kind = Literal["math", "choice"]

TIMEOUT_S = 5  # of one symbolic step
MAX_SYMBOLIC_CHARS = 2000  # a longer answer is not an expression

_ANSWER = re.compile(r"answer:\s*(.*)", re.IGNORECASE | re.DOTALL)
_THINKING_ENDS = ("<|im_start|>answer", "</think>")
_WRAPPERS = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"(?<![A-Za-z])([A-Z])(?![A-Za-z])")
_NOISE = re.compile(r"\s+|\\[,;:! ]|\\left|\\right|\\\$|\$|\\%|%|\.$")


def extract_answer(text: str) -> str | None:
    """The final answer in ``text``, after any thinking in it; None if there is none."""
    for end in _THINKING_ENDS:
        text = text[text.rfind(end) + len(end) :] if end in text else text
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    at = text.lower().rfind("answer:")
    match = _ANSWER.match(text, at) if at >= 0 else None
    return match.group(1).strip() if match else None


def _last_boxed(text: str) -> str | None:
    """Content of the last complete ``\\boxed`` or ``\\fbox``, with matched braces."""
    for opening in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for i in range(opening.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[opening.end() : i]
    return None


def is_correct(extracted: str | None, expected: str, kind: Kind = "math") -> bool:
    """Whether both answers are equal: integers by value (``023`` is 23), mathematics by meaning,
    choices by their letter."""
    if extracted is None:
        return False
    if kind == "choice":
        return choice_letter(extracted) == expected.strip().upper()
    given, wanted = _integer(extracted), _integer(expected)
    if given is not None and wanted is not None:
        return given == wanted
    return _plain(extracted) == _plain(expected) or _same_meaning(extracted, expected)


def canonical(extracted: str, kind: Kind) -> str:
    """The answer in the form of an expected answer, for comparison with others."""
    return (choice_letter(extracted) or extracted) if kind == "choice" else extracted


def choice_letter(text: str) -> str | None:
    """The first separate capital letter in ``text``: B of ``(B)``, ``B) 3 eV``, ``\\text{B}``."""
    match = _LETTER.search(_WRAPPERS.sub(r"\1", text))
    return match.group(1) if match else None


def _integer(text: str) -> int | None:
    try:
        return int(text.strip().rstrip(".").replace(",", "").strip("$ "))
    except ValueError:
        return None


def _plain(text: str) -> str:
    return _NOISE.sub("", _WRAPPERS.sub(r"\1", text.strip()))


@functools.lru_cache(maxsize=4096)
def _same_meaning(given: str, wanted: str) -> bool:
    """Whether math-verify finds both expressions equal."""
    if max(len(given), len(wanted)) > MAX_SYMBOLIC_CHARS:
        return False
    from math_verify import parse, verify  # takes a second

    # Its timeout is an alarm signal, which only the main thread can set.
    is_main = threading.current_thread() is threading.main_thread()
    timeout = TIMEOUT_S if is_main else None
    gold, answer = (
        parse(text if "$" in text or "\\boxed" in text else f"${text}$", parsing_timeout=timeout)
        for text in (wanted, given)
    )
    return bool(verify(gold, answer, timeout_seconds=timeout))
