"""Answers of a model to many questions at once; each answer is saved as soon as it arrives.

A JSON lines file holds the answers of one model for one purpose, by question id. Only missing
answers are requested, so an interrupted funnel resumes. Failures are not saved: the next start
requests them again.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from s1engine.eval.backend import Backend, EvalRequest, EvalSample
from s1engine.sampling_params import SamplingParams
from s1engine.training.rows import TeacherTrace, read_complete_lines, write_jsonl

Answers = dict[str, TeacherTrace]


def collect_answers(
    backend: Backend,
    prompts: Mapping[str, str],
    params: SamplingParams,
    file: Path,
    *,
    progress: bool = True,
) -> tuple[Answers, dict[str, str]]:
    """Answers and errors by question id. ``file`` keeps the answers between calls."""
    answers = load_answers(file)
    missing = [name for name in prompts if name not in answers]
    failures: dict[str, str] = {}
    for key, name in enumerate(missing):
        backend.submit(EvalRequest(key, prompts[name], params, trace=True))
    with (
        file.open("a", encoding="utf-8") as out,
        tqdm(total=len(missing), desc=file.stem, unit="question", disable=not progress) as bar,
    ):
        for response in backend.responses() if missing else ():
            name = missing[response.request.key]
            if response.error is not None or not response.samples:
                failures[name] = response.error or "no samples"
            else:
                trace = answers[name] = split_thinking(response.samples[0])
                line = {"id": name, "thinking": trace.thinking, "attempt": trace.attempt}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                out.flush()
            bar.update()
    return {name: answers[name] for name in prompts if name in answers}, failures


def split_thinking(sample: EvalSample, answer_start: str = "<|im_start|>answer") -> TeacherTrace:
    """Thinking and answer of a sample. A server returns them separately; a trace with delimiters
    in its text is split at them."""
    thinking = sample.segments[0][0] if len(sample.segments) > 1 else ""
    whole = "".join(text for text, _ in sample.segments)
    if answer_start in whole:
        thinking = whole.rpartition(answer_start)[0]
        thinking = thinking.rpartition("<|im_start|>think")[2]
    answer = sample.text.rpartition(answer_start)[2]
    return TeacherTrace(thinking.strip(), answer.strip())


def load_answers(file: Path) -> Answers:
    """Answers of earlier calls; removes a truncated line from the file."""
    lines = read_complete_lines(file)
    if file.exists():
        write_jsonl(file, lines)
    return {line["id"]: TeacherTrace(line["thinking"], line["attempt"]) for line in lines}
