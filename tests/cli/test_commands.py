"""The command line: what it prints, its exit statuses, and one line for a user's mistake."""

import json
from pathlib import Path
from typing import Any

import pytest

from s1engine import cli
from s1engine.engine.llm import LLM
from s1engine.sampling_params import SamplingParams, ThinkingBudget

QUESTION = "a=3 b=a+4 c=b*2 c?"
COMMON = ("--dtype", "float32", "--max-num-seqs", "8")

DRAFTS_OF_FOUR = '{"method": "ngram", "num_speculative_tokens": 4}'


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(progress=False, dtype="float32", max_num_seqs=8)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(words)
    out, err = capsys.readouterr()
    return status, out, err


def test_generate_json_is_what_the_interface_says(
    capsys: pytest.CaptureFixture[str], llm: LLM
) -> None:
    flags = ("--thinking-token-budget", "30", "--num-waits", "1", "--wait-text", "Wait")
    status, out, _ = run(capsys, "generate", "--prompt", QUESTION, "--json", *flags, *COMMON)
    assert status == 0
    got = json.loads(out)
    params = SamplingParams(temperature=0, thinking=ThinkingBudget(max_tokens=30, num_waits=1))
    wanted = llm.chat([{"role": "user", "content": QUESTION}], params, progress=False)[0].to_json()
    timing = got.pop("timing")
    del wanted["timing"]
    assert got == wanted
    assert set(timing) == {"queue_s", "ttft_s", "total_s"}
    assert timing["queue_s"] <= timing["ttft_s"] <= timing["total_s"]
    (sample,) = got["outputs"]
    assert {"text", "reasoning", "token_ids", "forced", "finish_reason", "thinking"} == set(sample)
    assert len(sample["forced"]) == len(sample["token_ids"])
    assert got["usage"]["completion_tokens"] == len(sample["token_ids"])
    assert got["usage"]["completion_tokens_details"]["reasoning_tokens"] == 30


def test_generate_json_carries_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--thinking-checkpoints", "0,8", "--thinking-token-budget", "20")
    _, out, _ = run(capsys, "generate", "--prompt", QUESTION, "--json", *flags, *COMMON)
    checkpoints = json.loads(out)["checkpoints"]
    assert [checkpoint["budget"] for checkpoint in checkpoints] == [0, 8]
    for checkpoint in checkpoints:
        budget = ("--thinking-token-budget", str(checkpoint["budget"]))
        _, alone, _ = run(capsys, "generate", "--prompt", QUESTION, "--json", *budget, *COMMON)
        (sample,) = json.loads(alone)["outputs"]
        assert checkpoint["token_ids"] == sample["token_ids"]
        assert checkpoint["text"] == sample["text"]


def test_generate_prints_the_answer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "generate", "--prompt", QUESTION, *COMMON)
    assert status == 0 and out.startswith("Final Answer:") and out.count("\n") == 1
    assert "thinking" in err.splitlines()[-1]


def test_generate_raw_continues_the_text(capsys: pytest.CaptureFixture[str], llm: LLM) -> None:
    words = ("generate", "--prompt", "a=3 b=", "--raw", "--max-tokens", "5", "--json", *COMMON)
    _, out, _ = run(capsys, *words)
    params = SamplingParams(temperature=0, max_tokens=5)
    wanted = llm.generate("a=3 b=", params, progress=False)[0].outputs[0]
    assert json.loads(out)["outputs"][0]["token_ids"] == wanted.token_ids


def test_rows_of_a_file_keep_their_order_and_their_own_fields(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "one", "prompt": QUESTION, "thinking_token_budget": 5},
        {"id": 2, "messages": [{"role": "user", "content": QUESTION}]},
        {"prompt": QUESTION, "enable_thinking": False, "max_tokens": 4},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n\n".join(map(json.dumps, rows)))
    words = ("--input", str(source), "--output", str(target), "--thinking-token-budget", "9")
    status, out, _ = run(capsys, "generate", *words, *COMMON)
    assert status == 2 and out == ""  # the last row does not think but the flag sets a budget
    source.write_text("\n".join(map(json.dumps, rows[:2])))
    status, out, _ = run(capsys, "generate", *words, *COMMON)
    got = [json.loads(line) for line in target.read_text().splitlines()]
    assert status == 0 and out == ""
    assert [row["id"] for row in got] == ["one", 2]
    assert [row["outputs"][0]["thinking"]["tokens"] for row in got] == [5, 9]


def test_messages_of_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text(json.dumps([{"role": "user", "content": QUESTION}]))
    status, out, _ = run(capsys, "generate", "--messages", str(file), "--json", *COMMON)
    assert status == 0 and json.loads(out)["outputs"][0]["reasoning"]


BAD_ROWS = ["{", "[]", '{"prompt": 5}', '{"id": 1}', '{"prompt": "x", "colour": 1}', '{"n": 0}']


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_is_named_by_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, row: str
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{row}\n')
    status, out, err = run(capsys, "generate", "--input", str(file), "--json", *COMMON)
    assert status == 2 and out == ""
    assert f"{file}:2: " in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["generate", "--prompt", "x", "--temperature", "nan"], 2, "temperature"),
        (["generate", "--prompt", "x", "--thinking-token-budget", "-2"], 2, "thinking_token"),
        (
            ["generate", "--prompt", "x", "--max-tokens", "2", "--num-waits", "1"],
            2,
            "max_tokens",
        ),
        (["generate", "--prompt", "x", "--block-size", "3"], 2, "block_size"),
        (["generate", "--prompt", "x", "--reasoning-format", "wizard"], 2, "reasoning_format"),
        (["generate", "--prompt", "", "--raw"], 2, "prompt"),
        (["generate", "--prompt", "x", "--dtype", "int8"], 2, "dtype"),
        (["generate", "/no/such/model", "--prompt", "x"], 1, "/no/such/model"),
        (["generate", "--messages", "/no/such/file"], 1, "/no/such/file"),
        (["generate", "--prompt", "x", "--chat-template", "/no/such/file"], 2, "chat_template"),
        (["serve", "--port", "99999"], 2, "port"),
        (["serve", "--max-num-seqs", "0"], 2, "max_num_seqs"),
        (["serve", "--served-model-name", "a", "/tmp"], 2, "write it before the flag"),
        (["serve", "--speculative-config", "{}"], 2, "speculative_config"),
        (
            ["serve", "--num-speculative-tokens", "3", "--speculative-config", DRAFTS_OF_FOUR],
            2,
            "speculative_config differ",
        ),
        (["serve", "--reasoning-effort-budgets", "low"], 2, "reasoning_effort_budgets"),
        (["eval", "--task", "arithmetic", "--budgets", "x", "--out", "/tmp/x"], 2, "budgets"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], status: int, text: str
) -> None:
    got, out, err = run(capsys, *words)
    lines = [line for line in err.splitlines() if line.startswith("s1engine")]
    assert (got, out) == (status, "") and "Traceback" not in err
    assert len(lines) == 1 and lines[0].startswith(f"s1engine {words[0]}: error: ")
    assert text in lines[0]


@pytest.mark.parametrize("words", [[], ["dance"], ["generate"], ["serve", "--port", "x"]])
def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2 and "usage:" in capsys.readouterr().err


def test_help_is_quick_and_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(name in out for name in cli.COMMANDS)
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    out = capsys.readouterr().out
    for flag in ("--max-model-len", "--no-enable-prefix-caching", "--enforce-eager", "--api-key"):
        assert flag in out


def test_info_tells_the_part_of_a_rank(capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        json.loads(run(capsys, "info", "--json", "--no-ceilings", *words)[1])["model"]
        for words in ([], ["--tensor-parallel-size", "2"])
    ]
    assert [model["ranks"] for model in found] == [1, 2]
    assert found[1]["kv_bytes_per_token"] * 2 == found[0]["kv_bytes_per_token"]
    assert found[1]["weight_bytes"] < 0.6 * found[0]["weight_bytes"]


def test_a_plan_ignores_no_flag_of_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--tensor-parallel-size", "2", "--num-speculative-tokens", "2")
    few = ("--gpus", "2", "--requests", "2", "--output-len", "4")
    status, out, _ = run(capsys, "info", "--plan", "--json", *words, *few)
    engine = json.loads(out)["engine"]
    assert status == 0 and engine["tensor_parallel_size"] == engine["num_speculative_tokens"] == 2


def test_info_tells_what_fits(capsys: pytest.CaptureFixture[str], llm: LLM) -> None:
    status, out, _ = run(capsys, "info", "--json", "--dtype", "float32")
    facts = json.loads(out)
    assert status == 0 and facts["ceilings"]["read_gb_per_s"] > 0
    assert facts["model"]["parameters"] == llm.engine.model_config.num_parameters
    assert facts["model"]["kv_bytes_per_token"] == 2 * 4 * 2 * 32 * 4
    assert facts["model"]["kv_cache_tokens"] >= facts["model"]["max_model_len"] == 2048
    assert run(capsys, "info", "--no-ceilings")[1].startswith("machine\n")


def test_bench_ends_in_one_json_object(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = tmp_path / "host.json"
    words = ("--num-seqs", "4", "--context", "64", "--steps", "3", "--save", str(saved))
    status, out, _ = run(capsys, "bench", "host", *words)
    result = json.loads(out.splitlines()[-1])
    assert status == 0 and result["step_us"] > 0 and result["num_seqs"] == 4
    assert result == json.loads(saved.read_text()) and result["where"]["torch"]
