"""Training text and the start of its loss: s1's format on s1's rows, and bad rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from s1engine.errors import ModelError, RequestError
from s1engine.training.rows import Json, TeacherTrace, parse_row, write_jsonl
from s1engine.training.sft.samples import (
    TrainingSet,
    format_completion,
    load_tokenizer,
    load_training_set,
)
from s1engine.training.sft.sft_config import SftConfig
from tests.shared_data import shared_file
from tests.tiny_tokenizer import save_tokenizer
from tests.training.small_runs import NANO, chain_rows


def recipe(tmp_path: Path, given: list[Json], **fields: Any) -> SftConfig:
    write_jsonl(tmp_path / "rows.jsonl", given)
    defaults = {"data": [str(tmp_path / "rows.jsonl")], "out": "-", "model": str(NANO)}
    return SftConfig.from_dict({**defaults, "block_size": 2048, **fields})


def load(config: SftConfig) -> TrainingSet:
    return load_training_set(config, load_tokenizer(config))


def test_the_text_is_s1s_and_the_loss_starts_at_the_think_delimiter(tmp_path: Path) -> None:
    (given,) = chain_rows(1)
    config = recipe(tmp_path, [given])
    tokenizer = load_tokenizer(config)
    (sample,) = load_training_set(config, tokenizer).samples
    prompt, completion = (
        tokenizer.decode(list(part))
        for part in (sample.ids[: sample.num_prompt], sample.ids[sample.num_prompt :])
    )
    question, thinking = given["question"], given["thinking_trajectories"][0].strip()
    assert prompt == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    answer = given["attempt"]
    assert completion == (
        f"<|im_start|>think\n{thinking}\n<|im_start|>answer\n{answer}<|im_end|>\n"
    )
    assert list(sample.ids) == tokenizer.encode(prompt + completion, add_special_tokens=False)


def test_a_bare_answer_gets_a_prefix(tmp_path: Path) -> None:
    config = recipe(tmp_path, [])
    assert format_completion(TeacherTrace("t", " 4 \n"), config).endswith(
        "<|im_start|>answer\nAnswer: 4"
    )
    assert format_completion(TeacherTrace("t", "The Answer: 4"), config).endswith("\nThe Answer: 4")


def test_published_rows_give_the_published_text() -> None:
    """Qwen's own template, with its default system message, over five rows of s1K-1.1."""
    from jinja2 import Environment

    form = json.loads(shared_file("tokenizer/s1_chat_format.json").read_text())
    template = json.loads(shared_file("tokenizer/qwen2.5/tokenizer_config.json").read_text())
    compiled = Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        template["chat_template"]
    )
    config = SftConfig.from_dict({"data": ["-"], "out": "-", "model": "-"})
    file = shared_file("s1k/s1k_five_rows_with_traces.jsonl")
    for line in file.read_text().splitlines():
        row = parse_row(json.loads(line))
        trace = row.trace("gemini")
        assert trace is not None
        chat = [
            {"role": "user", "content": row.question},
            {"role": "assistant", "content": format_completion(trace, config)},
        ]
        answer = trace.attempt.strip()
        if "Answer:" not in answer:
            answer = f"Answer: {answer}"
        expected = form["training_text_template"].format(
            system_prompt=form["system_prompt"], question=row.question,
            thinking=trace.thinking.strip(), answer=answer,
        )  # fmt: skip
        assert compiled.render(messages=chat) == expected


def test_rows_without_a_trace_and_long_ones_are_counted(tmp_path: Path) -> None:
    good = chain_rows(4)
    bare = {name: good[0][name] for name in ("question", "solution")}
    empty = good[0] | {"thinking_trajectories": [" "]}
    given = [*good, bare, empty]
    sizes = sorted(len(sample.ids) for sample in load(recipe(tmp_path, given)).samples)
    assert load(recipe(tmp_path, given)).counts == {"rows": 6, "without a trace": 2}
    limit = sizes[-1] - 1
    truncated = load(recipe(tmp_path, given, block_size=limit))
    assert truncated.counts["longer than block_size, truncated"] >= 1
    assert len(truncated.samples) == 4 and max(len(one.ids) for one in truncated.samples) == limit
    dropped = load(recipe(tmp_path, given, block_size=limit, too_long="drop"))
    assert len(dropped.samples) == 4 - dropped.counts["longer than block_size, dropped"]
    with pytest.raises(RequestError, match=r"block_size .*rows.jsonl:\d has"):
        load(recipe(tmp_path, given, block_size=limit, too_long="error"))
    with pytest.raises(RequestError, match="4 without a completion"):
        load(recipe(tmp_path, good, block_size=8))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"question": ""}, "rows.jsonl:1: question must be text"),
        ({"thinking_trajectories": []}, "rows.jsonl:1: thinking_trajectories must be a list"),
        ({"attempt": 3}, "rows.jsonl:1: the thinking and the attempt"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, change: Json, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        load(recipe(tmp_path, [chain_rows(1)[0] | change]))


def test_missing_delimiters_are_named(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, ("<|endoftext|>", "<end>"))
    with pytest.raises(RequestError, match=r"think_start: '<\|im_start\|>think'") as caught:
        load(recipe(tmp_path, chain_rows(1), tokenizer=str(tmp_path)))
    assert caught.value.param == "think_start"


def test_a_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load(recipe(tmp_path, chain_rows(1), tokenizer=str(tmp_path)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"data: .*nowhere.jsonl"):
        load(recipe(tmp_path, [], data=["nowhere.jsonl"]))
