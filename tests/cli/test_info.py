"""``s1engine info --json``: what a bug report needs, without secrets."""

import json
import platform

import pytest
import torch

from s1engine import __version__, cli
from s1engine.config import BUNDLED_MODEL


def info(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["info", *words, "--json", "--no-ceilings"]) == 0
    return capsys.readouterr().out


def test_a_bug_report_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--device", "cpu", "--dtype", "float32", "--max-num-seqs", "3")
    facts = json.loads(info(capsys, str(BUNDLED_MODEL), *words))
    software, hardware = facts["software"], facts["hardware"]
    assert software["s1engine"] == __version__ and software["torch"] == torch.__version__
    assert software["python"] == platform.python_version()
    assert {"commit", "triton", "transformers", "os"} <= set(software)
    assert hardware["cores"] >= hardware["usable_cores"] >= 1 and hardware["cpu"]
    assert hardware["memory_bytes"] > hardware["available_memory_bytes"] > 0
    assert len(hardware["gpus"]) == torch.cuda.device_count()
    assert isinstance(hardware["instruction_sets"], list)
    engine = facts["engine_config"]
    assert (engine["device"], engine["max_num_seqs"]) == ("cpu", 3)
    assert None not in (engine["block_size"], engine["run_ahead"])  # resolved
    assert facts["model_config"]["vocab_size"] >= 300 and facts["model"]["dtype"] == "float32"


def test_the_rule_of_thinking_and_the_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(info(capsys, "--device", "cpu"))
    chats, model = facts["chats"], facts["model"]
    assert chats["reasoning_format"] == "s1" and chats["thinks_by_default"]
    assert chats["because"] == "reasoning_format s1"  # its config.json says so
    assert chats["thinking_opens_by"] == "<|im_start|>think"
    assert chats["turn_ends_by"] == ["<|im_end|>"] and chats["sampling"] == {"temperature": 0.0}
    sizes = [model[f"weight_bytes{fmt}"] for fmt in ("", "_int8", "_int4")]
    assert sizes == sorted(sizes, reverse=True) and model["implementation"] == "native"
    plain = json.loads(info(capsys, "--device", "cpu", "--reasoning-format", "none"))["chats"]
    assert plain["reasoning_format"] is None and not plain["thinks_by_default"]
    assert cli.main(["info", "--no-ceilings"]) == 0
    out = capsys.readouterr().out
    assert "chats\n" in out and "temperature 0.0" in out


def test_secrets_are_hidden(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S1ENGINE_API_KEY", "very-secret")
    monkeypatch.setenv("S1ENGINE_NVTX", "0")
    monkeypatch.setenv("HF_TOKEN", "also-secret")
    out = info(capsys)
    assert "secret" not in out
    variables = json.loads(out)["environment"]
    assert variables["S1ENGINE_API_KEY"] == "(hidden)" and variables["S1ENGINE_NVTX"] == "0"
    assert "HF_TOKEN" not in variables


def test_a_wrong_log_level_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S1ENGINE_LOG_LEVEL", "loud")
    assert cli.main(["info"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("s1engine info: error: S1ENGINE_LOG_LEVEL must be one of")
    assert err.count("\n") == 1
