"""Two filters of questions, by s1's rules: word overlap, and bad formatting.

A question overlaps with a test set or an earlier source if they share eight words in a row. Words
are lowercased and split at whitespace; punctuation stays. Fewer than eight words never overlap.
"""

import re
from collections.abc import Iterable

NGRAM = 8


def ngrams(question: str, n: int = NGRAM) -> set[tuple[str, ...]]:
    """All runs of ``n`` words."""
    words = question.lower().split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


class Seen:
    """The 8-grams of questions seen so far, each with where it was seen first."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, ...], str] = {}

    def add(self, questions: Iterable[str], place: str) -> None:
        for question in questions:
            for gram in ngrams(question):
                self._places.setdefault(gram, place)

    def overlap(self, question: str) -> str | None:
        """Where an 8-gram of ``question`` was seen; None if nowhere."""
        found = sorted(self._places[gram] for gram in ngrams(question) if gram in self._places)
        return found[0] if found else None


_PART = re.compile(r"p[1-9]\d{0,2}\.")
_BOLD_NUMBER = re.compile(r"\*\*[^*\n]*\d[^*\n]*\*\*")


def fault(question: str, source: str) -> str | None:
    """What is wrong with a question; None if nothing is. Asymptote drawings are let through from
    AIME, whose statements do without them."""
    if "[asy]" in question and "aime" not in source.lower():
        return "holds a drawing ([asy])"
    if "![Image]" in question:
        return "holds a picture"
    if _PART.search(question):
        return "is one of several numbered parts"
    if _BOLD_NUMBER.search(question):
        return "holds a number in bold"
    return None
