"""Which questions share eight words in a row with a test set or an earlier source.

As s1 does it: lowercase, whitespace words, no punctuation removed; one shared 8-gram is enough, and
a question of fewer than eight words is never caught.
"""

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
