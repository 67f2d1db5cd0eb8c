"""What a model answered, read out of its text, and whether it is right.

Extraction follows s1's harness: the last ``\\boxed{...}`` of the answer, else what follows the last
"Answer:". Knows nothing of engines or tasks.
"""

import re

_ANSWER = re.compile(r"answer:\s*(.*)", re.IGNORECASE | re.DOTALL)


def extract_answer(text: str) -> str | None:
    """The final answer in ``text``; None if it states none."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    at = text.lower().rfind("answer:")
    match = _ANSWER.match(text, at) if at >= 0 else None
    return match.group(1).strip() if match else None


def _last_boxed(text: str) -> str | None:
    """Content of the last complete ``\\boxed`` or ``\\fbox``, braces matched."""
    for opening in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for i in range(opening.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[opening.end() : i]
    return None


def is_correct(extracted: str | None, expected: str) -> bool:
    """Do both say the same? Integers by value (``023`` is 23), anything else by its characters."""
    if extracted is None:
        return False
    given, wanted = (text.strip().rstrip(".").replace(",", "") for text in (extracted, expected))
    try:
        return int(given) == int(wanted)
    except ValueError:
        return given == wanted
