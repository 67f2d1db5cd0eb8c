"""Tasks and their rows: real files, bad rows, shuffled options."""

import json
import random
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.errors import RequestError
from s1engine.eval.tasks import TASKS, QuestionSet, arithmetic_questions, load_questions
from tests.shared_data import shared_file


def load(name: str, data: Path | None, **options: object) -> QuestionSet:
    return load_questions(TASKS[name], data, **({"seed": 0, "skip_bad": False} | options))  # type: ignore[arg-type]


def write(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_shared_sets_are_read_whole() -> None:
    aime = load("aime24", shared_file("math/aime24.jsonl")).questions
    assert len(aime) == 30 and all(0 <= int(q.answer) <= 999 for q in aime)
    math500 = load("math500", shared_file("math/math500.jsonl")).questions
    assert len(math500) == 500 and math500[0].id == "test/precalculus/807.json"
    gsm8k = load("gsm8k", shared_file("math/gsm8k_test.jsonl")).questions
    assert (
        len(gsm8k) == 1319
        and gsm8k[0].answer == "18"
        and all("####" not in q.answer for q in gsm8k)
    )
    older = load("aime25", shared_file("math/aime_1983_2023.json")).questions
    assert len(older) == 975


def test_rows_keep_their_extra_keys_and_whole_numbers_have_no_point(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "question": "1+1?", "answer": 2.0, "level": "easy"},
        {"id": 7, "question": " 1+2? ", "answer": "3"},
        {"question": "no id", "answer": 0.5},
    ]
    a, b, c = load("jsonl", write(tmp_path, *rows)).questions
    assert (a.id, a.prompt, a.answer, a.extra) == ("a", "1+1?", "2", {"level": "easy"})
    assert (b.id, b.prompt) == ("7", "1+2?")
    assert (c.id, c.answer) == ("rows-2", "0.5")
    assert [q.id for q in load("jsonl", tmp_path / "rows.jsonl", limit=2).questions] == ["a", "7"]


BAD = [
    ("{", "is no JSON"),
    ("[1]", "must be an object"),
    ({"id": "x", "question": "?"}, "'answer' is missing"),
    ({"id": "x", "question": "", "answer": "1"}, "'question' is empty"),
    ({"id": "x", "question": ["?"], "answer": "1"}, "'question' must be text"),
    ({"id": "x", "question": "?", "answer": True}, "'answer' must be text"),
    ({"id": "good", "question": "?", "answer": "1"}, "taken by an earlier row"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: object, reason: str) -> None:
    good = {"id": "good", "question": "?", "answer": "1"}
    path = write(tmp_path, good, "", row)
    with pytest.raises(RequestError, match=f"1 bad rows .* line 3: .*{reason}"):
        load("jsonl", path)
    found = load("jsonl", path, skip_bad=True)
    assert [q.id for q in found.questions] == ["good"]
    assert [str(bad).partition(":")[0] for bad in found.skipped] == ["line 3"]


def test_bytes_that_are_not_text_are_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a", "question": "\xff", "answer": "1"}\n')
    with pytest.raises(RequestError, match="line 1: is not UTF-8"):
        load("jsonl", path)
    with pytest.raises(RequestError, match="holds no questions"):
        load("jsonl", path, skip_bad=True)


def gpqa_file(folder: Path) -> Path:
    header = (
        "Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3"
    )
    rows = [f'r{i},"Which, {i}?",right {i}," wrong\n{i}",bad {i},false {i}' for i in range(40)]
    return write(folder, header, *rows, name="gpqa.csv")


def test_choices_are_shuffled_reproducibly_and_the_letter_follows(tmp_path: Path) -> None:
    path = gpqa_file(tmp_path)
    found = load("gpqa-diamond", path).questions
    assert found == load("gpqa-diamond", path).questions
    assert found != load("gpqa-diamond", path, seed=1).questions
    assert {q.answer for q in found} == set("ABCD")
    for i, question in enumerate(found):
        head, blank, *lines = question.prompt.split("\n")
        assert (head, blank, question.kind) == (f"Which, {i}?", "", "choice")
        options = dict(line.split(") ", 1) for line in lines)
        assert list(options) == list("ABCD")
        assert set(options.values()) == {f"right {i}", f"wrong {i}", f"bad {i}", f"false {i}"}
        assert options[question.answer] == f"right {i}"


def test_the_first_shuffle_is_that_of_pythons_generator(tmp_path: Path) -> None:
    order = ["wrong 0", "bad 0", "false 0", "right 0"]
    random.Random(0).shuffle(order)
    lines = load("gpqa-diamond", gpqa_file(tmp_path)).questions[0].prompt.split("\n")[2:]
    assert [line[3:] for line in lines] == order


def test_a_short_csv_row_is_bad(tmp_path: Path) -> None:
    path = gpqa_file(tmp_path)
    path.write_text(path.read_text() + "r40,only a question\n")
    with pytest.raises(RequestError, match="line 82: has too few columns"):
        load("gpqa-diamond", path)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="No such file"):
        load("aime24", tmp_path / "none.jsonl")
    with pytest.raises(RequestError, match="needs --data FILE"):
        load("jsonl", None)
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import of it fails
    with pytest.raises(RequestError, match=r"--data FILE.*pip install 's1engine\[hub\]'"):
        load("math500", None)


def test_the_hub_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    fake = types.ModuleType("datasets")

    def load_dataset(*args: object, **kwargs: object) -> list[dict[str, str]]:
        asked.append((args, kwargs))
        return [{"question": "1+1?", "answer": "so #### 2"}]

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    (question,) = load("gsm8k", None).questions
    assert (question.id, question.answer) == ("gsm8k-0", "2")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network\nat all")

    fake.load_dataset = offline  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match=r"from the hub \(no network\); give --data FILE"):
        load("gsm8k", None)


@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 20))
def test_fewer_generated_questions_are_the_first_of_more(seed: int, a: int, b: int) -> None:
    few, many = sorted((arithmetic_questions(seed, n) for n in (a, b)), key=len)
    assert many[: len(few)] == few
