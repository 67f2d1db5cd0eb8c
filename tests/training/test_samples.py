"""Training text and where its loss begins: s1's format on its own rows, and bad rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from s1engine.errors import ModelError, RequestError
from s1engine.training.rows import Json, Trace, from_json, write_jsonl
from s1engine.training.sft import samples
from s1engine.training.sft.sft_config import SftConfig
from tests.shared_data import shared_file
from tests.tiny_tokenizer import save_tokenizer
from tests.training.runs import NANO, chain_rows


def config(tmp_path: Path, given: list[Json], **fields: Any) -> SftConfig:
    write_jsonl(tmp_path / "rows.jsonl", given)
    defaults = {"data": [str(tmp_path / "rows.jsonl")], "out": "-", "model": str(NANO)}
    return SftConfig.from_dict({**defaults, "block_size": 2048, **fields})


def load(made: SftConfig) -> samples.Dataset:
    return samples.load(made, samples.load_tokenizer(made))


def test_the_text_is_s1_s_and_the_loss_begins_at_the_think_delimiter(tmp_path: Path) -> None:
    (given,) = chain_rows(1)
    made = config(tmp_path, [given])
    tokenizer = samples.load_tokenizer(made)
    (sample,) = samples.load(made, tokenizer).samples
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


def test_a_bare_answer_is_called_one(tmp_path: Path) -> None:
    made = config(tmp_path, [])
    assert samples.completion(Trace("t", " 4 \n"), made).endswith("<|im_start|>answer\nAnswer: 4")
    assert samples.completion(Trace("t", "The Answer: 4"), made).endswith("\nThe Answer: 4")


def test_real_rows_make_the_published_text() -> None:
    """Qwen's own template, with its default system message, over the five real rows."""
    from jinja2 import Environment

    form = json.loads(shared_file("tokenizer/s1_chat_format.json").read_text())
    template = json.loads(shared_file("tokenizer/qwen2.5/tokenizer_config.json").read_text())
    compiled = Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        template["chat_template"]
    )
    made = SftConfig.from_dict({"data": ["-"], "out": "-", "model": "-"})
    file = shared_file("s1k/s1k_five_rows_with_traces.jsonl")
    for line in file.read_text().splitlines():
        row = from_json(json.loads(line))
        trace = row.trace("gemini")
        assert trace is not None
        chat = [
            {"role": "user", "content": row.question},
            {"role": "assistant", "content": samples.completion(trace, made)},
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
    sizes = sorted(len(sample.ids) for sample in load(config(tmp_path, given)).samples)
    assert load(config(tmp_path, given)).counts == {"rows": 6, "without a trace": 2}
    limit = sizes[-1] - 1
    cut = load(config(tmp_path, given, block_size=limit))
    assert cut.counts["longer than block_size, truncated"] >= 1
    assert len(cut.samples) == 4 and max(len(one.ids) for one in cut.samples) == limit
    dropped = load(config(tmp_path, given, block_size=limit, too_long="drop"))
    assert len(dropped.samples) == 4 - dropped.counts["longer than block_size, dropped"]
    with pytest.raises(RequestError, match=r"block_size .*rows.jsonl:\d has"):
        load(config(tmp_path, given, block_size=limit, too_long="error"))
    with pytest.raises(RequestError, match="4 without a completion"):
        load(config(tmp_path, good, block_size=8))


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
        load(config(tmp_path, [chain_rows(1)[0] | change]))


def test_missing_delimiters_are_named(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, ("<|endoftext|>", "<end>"))
    with pytest.raises(RequestError, match=r"think_start: '<\|im_start\|>think'") as caught:
        load(config(tmp_path, chain_rows(1), tokenizer=str(tmp_path)))
    assert caught.value.param == "think_start"


def test_a_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load(config(tmp_path, chain_rows(1), tokenizer=str(tmp_path)))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"data: .*nowhere.jsonl"):
        load(config(tmp_path, [], data=["nowhere.jsonl"]))
