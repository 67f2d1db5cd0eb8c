"""Is an attempt correct, and which field is a question about: by rules, or by a judge model.

A judge gives its verdict on its last line. An unreadable last line counts as no verdict, and the
candidate is dropped.
"""

from s1engine.eval.grade import extract_answer, is_correct

JUDGE = """Compare an attempt at a problem with the correct answer. Explain briefly whether the \
attempt reaches it, then write a last line that holds one word only: Yes or No.

## Problem
{question}

## Attempt
{attempt}

## Correct answer
{solution}"""

CLASSIFY = """To which field does this question belong? Reason briefly, then write a last line \
that holds one two-digit code only, out of this list of the Mathematics Subject Classification:
{fields}

## Question
{question}"""


def is_correct_by_rules(attempt: str, solution: str) -> bool:
    """Compares the attempt's final answer with the solution's, or with the whole solution if it
    states no final answer."""
    expected = extract_answer(solution) or solution.strip()
    return is_correct(extract_answer(attempt) or attempt.strip(), expected)


def parse_verdict(answer: str) -> bool | None:
    """Yes or No of a judge's last line; None if it is neither."""
    words = _last_line(answer).strip("*.` ").lower()
    return {"yes": True, "no": False}.get(words)


def parse_field_code(answer: str) -> str | None:
    """The two-digit code at the end of a judge's last line; None if no such field exists."""
    code = _last_line(answer).strip("*.` ")[-2:]
    return code if code in FIELDS else None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def field_list() -> str:
    """All fields as a judge reads them."""
    return "\n".join(f"{code} {name}" for code, name in FIELDS.items())


FIELDS = {
    "00": "General", "01": "History and biography", "03": "Mathematical logic and foundations",
    "05": "Combinatorics", "06": "Order, lattices, ordered algebraic structures",
    "08": "General algebraic systems", "11": "Number theory", "12": "Field theory and polynomials",
    "13": "Commutative algebra", "14": "Algebraic geometry", "15": "Linear and multilinear algebra",
    "16": "Associative rings and algebras", "17": "Nonassociative rings and algebras",
    "18": "Category theory", "19": "K-theory", "20": "Group theory",
    "22": "Topological groups, Lie groups", "26": "Real functions",
    "28": "Measure and integration", "30": "Functions of a complex variable",
    "31": "Potential theory", "32": "Several complex variables", "33": "Special functions",
    "34": "Ordinary differential equations", "35": "Partial differential equations",
    "37": "Dynamical systems", "39": "Difference and functional equations",
    "40": "Sequences, series, summability", "41": "Approximations and expansions",
    "42": "Harmonic analysis on Euclidean spaces", "43": "Abstract harmonic analysis",
    "44": "Integral transforms", "45": "Integral equations", "46": "Functional analysis",
    "47": "Operator theory", "49": "Calculus of variations and optimal control", "51": "Geometry",
    "52": "Convex and discrete geometry", "53": "Differential geometry", "54": "General topology",
    "55": "Algebraic topology", "57": "Manifolds and cell complexes",
    "58": "Global analysis, analysis on manifolds", "60": "Probability theory",
    "62": "Statistics", "65": "Numerical analysis", "68": "Computer science",
    "70": "Mechanics of particles and systems", "74": "Mechanics of deformable solids",
    "76": "Fluid mechanics", "78": "Optics, electromagnetic theory",
    "80": "Classical thermodynamics, heat transfer", "81": "Quantum theory",
    "82": "Statistical mechanics, structure of matter", "83": "Relativity and gravitation",
    "85": "Astronomy and astrophysics", "86": "Geophysics",
    "90": "Operations research, mathematical programming",
    "91": "Game theory, economics, social sciences", "92": "Biology and other natural sciences",
    "93": "Systems theory and control", "94": "Information and communication",
    "97": "Mathematics education",
}  # fmt: skip
"""Two-digit fields of the Mathematics Subject Classification, MSC2020."""
