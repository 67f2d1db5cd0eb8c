"""s1 in miniature, in miniature: every part runs, and the report says what was found."""

from pathlib import Path

import pytest

from s1engine.eval.arithmetic import is_held_out
from s1engine.training import rows
from s1engine.training.examples import miniature_pipeline as miniature
from s1engine.training.examples.miniature_data import base_corpus, domain, pool
from s1engine.training.examples.miniature_report import table, write


def test_nothing_trained_on_is_asked() -> None:
    asked = [row["question"] for row in base_corpus(60, 1) if "question" in row]
    asked += [row.question for row in pool(60, 1)]
    assert len(asked) > 100 and not any(map(is_held_out, asked))
    assert pool(60, 1) == pool(60, 1) != pool(60, 2)


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("a=1 b=a+2 c=b+3 c?", "sums"),
        ("a=1 b=a-2 c=b-3 c?", "differences"),
        ("a=1 b=a*2 b?", "products"),
        ("a=1 b=a*2 c=b-1 c?", "mixed"),
        ("a=1 a?", "mixed"),
    ],
)
def test_domains(question: str, name: str) -> None:
    assert domain(rows.Row(question)) == name


def test_all_of_it_with_a_handful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fewer in (("SELECTIONS", ("s1", "longest")), ("WAITS", (1,)), ("BUDGETS", (0, 16))):
        monkeypatch.setattr(miniature, name, fewer)
    sizes = miniature.Sizes(pool=20, count=4, base_rows=12, epochs=1, asked=4, threads=1)
    found = miniature.run_miniature(sizes, tmp_path)
    assert found["funnel"]["questions"] == 20 and found["funnel"]["chosen"] == 4
    assert set(found["results"]) == {"base", *miniature.SELECTIONS}
    asked = [row["run"] for row in found["results"]["s1"]]
    assert asked == ["without a think block", "budget 0", "budget 16", "no limit", "1 wait"]
    for row in found["results"]["s1"]:
        assert row["accuracy"] == pytest.approx(100 * row["right"].count("1") / 4, abs=0.01)
        if row["run"].startswith("budget"):
            assert row["thinking_tokens"] <= int(row["run"].split()[1])
    assert found["mean_trace"]["longest"] >= max(found["mean_trace"].values())
    write(found, tmp_path)
    assert (tmp_path / "miniature.md").read_text() == table(found)
    assert (tmp_path / "miniature.png").read_bytes().startswith(b"\x89PNG")
