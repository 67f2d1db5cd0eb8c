"""s1 in miniature with a handful of questions: every part runs, and the report is complete."""

from pathlib import Path

import pytest

from s1engine.eval.arithmetic import is_held_out
from s1engine.training.examples import miniature_pipeline
from s1engine.training.examples.miniature_data import base_corpus, question_domain, question_pool
from s1engine.training.examples.miniature_report import format_table, write_report
from s1engine.training.rows import TrainingRow


def test_training_questions_are_not_held_out() -> None:
    questions = [row["question"] for row in base_corpus(60, 1) if "question" in row]
    questions += [row.question for row in question_pool(60, 1)]
    assert len(questions) > 100 and not any(map(is_held_out, questions))
    assert question_pool(60, 1) == question_pool(60, 1) != question_pool(60, 2)


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
    assert question_domain(TrainingRow(question)) == name


def test_the_whole_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fewer in (("SELECTIONS", ("s1", "longest")), ("WAITS", (1,)), ("BUDGETS", (0, 16))):
        monkeypatch.setattr(miniature_pipeline, name, fewer)
    sizes = miniature_pipeline.MiniatureSizes(
        pool=20, count=4, base_rows=12, epochs=1, asked=4, threads=1
    )
    report = miniature_pipeline.run_miniature(sizes, tmp_path)
    assert report["funnel"]["questions"] == 20 and report["funnel"]["chosen"] == 4
    assert set(report["results"]) == {"base", *miniature_pipeline.SELECTIONS}
    runs = [row["run"] for row in report["results"]["s1"]]
    assert runs == ["without a think block", "budget 0", "budget 16", "no limit", "1 wait"]
    for row in report["results"]["s1"]:
        assert row["accuracy"] == pytest.approx(100 * row["right"].count("1") / 4, abs=0.01)
        if row["run"].startswith("budget"):
            assert row["thinking_tokens"] <= int(row["run"].split()[1])
    assert report["mean_trace"]["longest"] >= max(report["mean_trace"].values())
    write_report(report, tmp_path)
    assert (tmp_path / "miniature.md").read_text() == format_table(report)
    assert (tmp_path / "miniature.png").read_bytes().startswith(b"\x89PNG")
