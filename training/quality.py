"""Questions that are badly formatted, by s1's rules: pictures, numbered parts, bold numbers."""

import re

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
