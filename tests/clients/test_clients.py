"""Real clients against a server with s1-nano: `make clients`. Each script uses its client as the
client's documentation says, and prints its results; their names choose the checks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import HERE, environment, last_object, run_program

SIZES = [{"value": value, "unit": unit} for value in (1, 2, 3) for unit in ("cm", "m")]

# Script, its environment, and what it must report.
PYTHON = {
    "openai_sdk": (
        "agents",
        "text reasoning usage whole stream_usage tool structured response next_response",
    ),
    "anthropic_sdk": ("agents", "text reasoning whole tool runner_text counted"),
    "langchain_openai_chat": ("agents", "text usage whole tool structured response"),
    "pydantic_ai_agent": ("agents", "text usage whole structured by_tools response message"),
    "openai_agents_runs": ("agents", "text usage structured by_response tool_calls response"),
    "smolagents_agent": ("agents", "text usage whole tool_names"),
    "outlines_types": ("agents", "text structured by_vllm choice matched"),
    "litellm_calls": ("litellm", "text reasoning usage whole tool structured"),
    "llama_index_like": ("llama_index", "text usage whole tool structured"),
    "instructor_modes": (
        "instructor",
        "usage structured by_tools streamed_structure by_message",
    ),
}
JAVASCRIPT = {
    "openai_sdk": "text reasoning usage whole stream_usage tool structured response",
    "anthropic_sdk": "text reasoning whole tool counted",
    "ai_sdk": "text reasoning usage whole structured response loops",
}


def is_text(text: Any, _: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())


def is_sum(usage: Any, _: Any) -> bool:
    prompt, completion, total = usage
    return bool(prompt > 0 and completion > 0 and prompt + completion == total)


def is_size(value: Any, _: Any) -> bool:
    return value in SIZES


def is_call(call: Any, _: Any) -> bool:
    arguments = json.loads(call["arguments"])
    fits = arguments["city"] in ("Oslo", "Rome") and arguments["days"] in (1, 2, 3)
    return call["name"] == "forecast" and arguments.keys() == {"city", "days"} and fits


CHECKS: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    **dict.fromkeys(("text", "reasoning", "response", "next_response", "message"), is_text),
    "runner_text": is_text,
    **dict.fromkeys(("usage", "stream_usage"), is_sum),
    "whole": lambda whole, results: results["streamed"] == whole,
    "tool": is_call,
    **dict.fromkeys(("structured", "by_tools", "by_response", "by_message"), is_size),
    **dict.fromkeys(("by_vllm", "streamed_structure"), is_size),
    "counted": lambda counted, results: set(results["input_tokens"]) == {counted},
    "tool_calls": lambda counts, _: counts == [1, 1],
    "tool_names": lambda names, _: set(names) <= {"forecast", "final_answer"} and len(names) > 0,
    "choice": lambda choice, _: choice in ("red", "blue"),
    "matched": lambda digits, _: len(digits) == 3 and digits.isdecimal(),
    "loops": lambda loops, _: all(
        loop["calls"] == 1 and is_text(loop["text"], None) and is_call(loop, None)
        for loop in loops.values()
    ),
}


def check(results: dict[str, Any], expected: str) -> None:
    wrong = {
        name: results.get(name, "not reported")
        for name in expected.split()
        if name not in results or not CHECKS[name](results[name], results)
    }
    assert wrong == {}, results


@pytest.mark.parametrize("script", PYTHON)
def test_python(script: str, variables: dict[str, str], tmp_path: Path) -> None:
    name, expected = PYTHON[script]
    command = [str(environment(name) / "bin/python"), str(HERE / "scripts" / f"{script}.py")]
    check(last_object(run_program(command, variables, tmp_path)), expected)


@pytest.mark.parametrize("script", JAVASCRIPT)
def test_javascript(script: str, variables: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(environment("javascript") / "node_modules")
    for file in HERE.glob("javascript/*.mjs"):  # node looks for modules beside the script
        shutil.copy(file, tmp_path)
    stdout = run_program(["node", f"{script}.mjs"], variables, tmp_path)
    check(last_object(stdout), JAVASCRIPT[script])
