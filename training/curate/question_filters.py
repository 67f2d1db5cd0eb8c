"""Two filters of questions, by s1's rules: word overlap, and bad formatting.

A question overlaps with a test set or an earlier source if they share eight consecutive words.
Words are lowercased and split at whitespace; punctuation stays. Fewer than eight words never
overlap.
"""

import re
from collections.abc import Iterable

NGRAM = 8
_PART = re.compile(r"p[1-9]\d{0,2}\.")
_BOLD_NUMBER = re.compile(r"\*\*[^*\n]*\d[^*\n]*\*\*")


def _ngrams(question: str) -> set[tuple[str, ...]]:
    words = question.lower().split()
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


class NgramIndex:
    """The 8-grams of questions, each with the name of its first source."""

    def __init__(self) -> None:
        self._sources: dict[tuple[str, ...], str] = {}

    def add(self, questions: Iterable[str], source: str) -> None:
        for question in questions:
            for gram in _ngrams(question):
                self._sources.setdefault(gram, source)

    def find_overlap(self, question: str) -> str | None:
        """A source that shares an 8-gram with ``question``; None if there is none."""
        return min(
            (self._sources[gram] for gram in _ngrams(question) if gram in self._sources),
            default=None,
        )


def formatting_fault(question: str, source: str) -> str | None:
    """Why a question is badly formatted; None if it is not. Asymptote drawings are accepted from
    AIME, whose statements are complete without them."""
    if "[asy]" in question and "aime" not in source.lower():
        return "holds a drawing ([asy])"
    if "![Image]" in question:
        return "holds a picture"
    if _PART.search(question):
        return "is one of several numbered parts"
    if _BOLD_NUMBER.search(question):
        return "holds a number in bold"
    return None
