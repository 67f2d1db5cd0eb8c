"""One word per thing: words that the glossary retired do not come back, names are not used twice.

Only words that are unmistakable are searched for; docs/GLOSSARY.md has the rules for the others.
"""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("s1engine", "kernels", "training", "bench", "tests", "csrc", "docs", "examples")
SUFFIXES = {".py", ".pyi", ".cpp", ".hpp", ".inc", ".md", ".yaml", ".toml"}
SHIPPED = ("s1engine", "kernels", "training", "bench")
MAX_SAME_NAME = 2

# What was said, and what is said now.
RETIRED = {
    r"seat(s|ed)?|unseat(ed)?": "req_index, row of the persistent batch",
    r"Lanes?(Field|Writer)?|lane_(ptr|fields)|LANE_FIELDS|take_off_lane": "row of the device batch",
    r"began_run|begin_run|extend_run|run_must_end|RunBatch|RunState|RunFormat": "multi-step decode",
    r"scratch_(slot|block)": "null slot, null block",
    r"unwatch|progressed|take_news|has_news|clear_news_of_step": "outputs",
    r"Inbox": "OutputCollector",
    r"TrackRecord|Allowance|Guess": "AcceptanceStats, RegretBudget, DraftToken",
    r"rehears(e|al|es)|was_first": "dummy_run, recorded_now",
    r"CpuPlans|cpu_plans": "CpuGraphRunner",
    r"as_computed|attend_tile|weight_rows": "see GLOSSARY",
    r"overlap\.(release|wait)|scratch block": "pdl, null block",
    r"fingerprint\(|Member\(|class Ranks|Peers": "weights_digest, Worker, WorkerGroup",
    r"numbers that are none": "NaN and infinity",
    r"ThinkingPlan|StepTokens|SampleStream|GuideMaker|ServedEngine|RemoteLLMEngine": "see GLOSSARY",
    r"BlockAnswers|OpenAIAnswers|ChatAnswers|CompletionAnswers": "response formatter",
    r"RayFleet|create_front|FleetOptions|PrefixTrail": "router, replica pool",
    r"(?i:whoever|nobody|somebody|thereof)": "the thing itself",
}

ALLOWED = {
    "csrc/cpu/": r"Lanes?",  # of a vector register
    "tests/models/test_loader.py": "nobody",  # a user's name
    "docs/GLOSSARY.md": "nobody",  # the rule itself
}


def texts() -> list[tuple[str, str]]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    paths += [*ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    return [
        (str(path.relative_to(ROOT)), path.read_text())
        for path in paths
        if path.is_file() and (path.suffix in SUFFIXES or path.name == "Makefile")
        if path != Path(__file__).resolve() and path.name != "CHANGELOG.md"
    ]


@pytest.mark.parametrize("word", RETIRED)
def test_retired_words_stay_retired(word: str) -> None:
    pattern = re.compile(rf"\b(?:{word})\b")
    places = [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), start=1)
        if (match := pattern.search(line)) and not is_allowed(name, match.group())
    ]
    assert places == [], f"the word is now: {RETIRED[word]}"


def is_allowed(name: str, word: str) -> bool:
    return any(
        name.startswith(prefix) and re.fullmatch(pattern, word)
        for prefix, pattern in ALLOWED.items()
    )


def classes() -> Counter[str]:
    """Names of the module-level classes of the package that other modules may import."""
    return Counter(
        node.name
        for folder in SHIPPED
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )


def test_no_two_classes_have_one_name() -> None:
    assert [name for name, count in classes().items() if count > 1] == []


def test_no_file_name_is_used_more_than_twice() -> None:
    names = Counter(
        path.name
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SUFFIXES
        and path.name not in ("__init__.py", "__main__.py", "conftest.py")
    )
    assert [name for name, count in names.items() if count > MAX_SAME_NAME] == []
