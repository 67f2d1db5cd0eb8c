"""Evaluation harnesses and a load tool against a server with s1-nano: `make clients`. Their tasks
and data are written here; log-likelihoods equal those of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from s1engine.config import BUNDLED_MODEL
from tests.clients.conftest import environment, run_program
from tests.server.conftest import KEY

ROWS = [
    {"question": "a=3 b=a+4 b?", "choices": ["7", "4", "22"], "answer": 0},
    {"question": "x=1 y=x+1 y?", "choices": ["5", "2"], "answer": 1},
]
CHOICE = """\
task: nano_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} Final Answer:"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}]
"""
GENERATION = """\
task: nano_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 200, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
NANO = str(BUNDLED_MODEL)


def likelihood(prompt: str, continuation: str) -> tuple[float, bool]:
    """Sum of the continuation's log-probabilities, and whether it is greedy, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    first = len(tokenizer.encode(prompt))
    ids = torch.tensor([tokenizer.encode(prompt + continuation)])
    with torch.inference_mode():
        logprobs = model(ids).logits[0, first - 1 : -1].log_softmax(-1)
    targets = ids[0, first:]
    chosen = logprobs.gather(1, targets[:, None])[:, 0]
    return float(chosen.sum()), bool((logprobs.argmax(-1) == targets).all())


def run_lm_eval(
    kind: str, task: str, model_args: str, variables: dict[str, str], folder: Path
) -> list[dict[str, Any]]:
    """Run a task; return its logged samples."""
    program = environment("lm_eval") / "bin/lm_eval"
    data = folder / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    for name, text in (("nano_choice", CHOICE), ("nano_generation", GENERATION)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    command = [str(program), "--model", kind, "--model_args", model_args, "--tasks", task]
    command += ["--include_path", str(folder), "--output_path", "out", "--log_samples"]
    if kind == "local-chat-completions":
        command += ["--apply_chat_template"]
    run_program(command, variables, folder)
    [samples] = (folder / "out").rglob("samples_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def test_lm_eval_likelihoods(variables: dict[str, str], tmp_path: Path) -> None:
    url = variables["OPENAI_BASE_URL"]
    arguments = f"model=s1-nano,base_url={url}/completions,tokenizer={NANO}"
    rows = run_lm_eval("local-completions", "nano_choice", arguments, variables, tmp_path)
    assert len(rows) == len(ROWS)
    for row in rows:
        prompt = f"{row['doc']['question']} Final Answer:"
        for choice, [[value, greedy]] in zip(row["doc"]["choices"], row["resps"], strict=True):
            wanted, is_greedy = likelihood(prompt, f" {choice}")
            assert float(value) == pytest.approx(wanted, abs=2e-3)
            assert (str(greedy) == "True") == is_greedy


@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_lm_eval_generation(kind: str, variables: dict[str, str], tmp_path: Path) -> None:
    url = variables["OPENAI_BASE_URL"]
    if kind == "local-completions":
        arguments = f"model=s1-nano,base_url={url}/completions,tokenizer={NANO}"
    else:
        arguments = f"model=s1-nano,base_url={url}/chat/completions"
    rows = run_lm_eval(kind, "nano_generation", arguments, variables, tmp_path)
    answers = [row["resps"][0][0] for row in rows]
    assert len(answers) == len(ROWS) and all(answer.strip() for answer in answers)
    if kind == "local-chat-completions":
        assert answers[0] == "Final Answer: 7"


INSPECT_TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes


@task
def nano() -> Task:
    return Task(dataset=[Sample(input="a=3 b=a+4 b?", target="7")], scorer=includes())
"""


@pytest.mark.parametrize("model", ["openai-api/nano/s1-nano", "anthropic/s1-nano"])
def test_inspect_ai(model: str, variables: dict[str, str], tmp_path: Path) -> None:
    program = environment("inspect_ai") / "bin/inspect"
    (tmp_path / "task.py").write_text(INSPECT_TASK)
    named = {"NANO_BASE_URL": "OPENAI_BASE_URL", "NANO_API_KEY": "OPENAI_API_KEY"}
    variables |= {name: variables[source] for name, source in named.items()}
    command = [str(program), "eval", "task.py", "--model", model, "--temperature", "0"]
    command += ["--display", "plain", "--log-format", "json", "--log-dir", "logs"]
    run_program(command, variables, tmp_path)
    [file] = tmp_path.glob("logs/*.json")
    log = json.loads(file.read_text())
    assert log["status"] == "success"
    assert log["results"]["scores"][0]["metrics"]["accuracy"]["value"] == 1
    [usage] = log["stats"]["model_usage"].values()
    assert usage["reasoning_tokens"] > 0 and usage["total_tokens"] > usage["output_tokens"] > 0


def test_guidellm(nano_url: str, variables: dict[str, str], tmp_path: Path) -> None:
    program = environment("guidellm") / "bin/guidellm"
    backend = f"kind=openai_http,target={nano_url},model=s1-nano,api_key={KEY}"
    command = [str(program), "run", "--backend", backend, "--profile", "kind=synchronous"]
    command += ["--constraint", "kind=max_requests,count=3"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=12"]
    command += ["--tokenizer", f"kind=hf_auto,model={NANO}", "--disable-console-interactive"]
    command += ["--output", "kind=json,path=out.json"]
    run_program(command, variables, tmp_path)
    report = json.loads((tmp_path / "out.json").read_text())
    [benchmark] = report["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), len(requests["errored"])) == (3, 0)
    assert all(row["output_metrics"]["text_tokens"] == 12 for row in requests["successful"])
