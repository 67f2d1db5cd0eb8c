"""Asking models about many questions at once, each answer kept the moment it comes.

Answers stand in a JSON lines file, one for each model and purpose, by question id. Whoever asks
again is asked only what is missing, so a funnel that was stopped goes on. A failure is kept out of
the file: the next start tries it again.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from s1engine.eval.backend import Backend, EvalRequest, EvalSample
from s1engine.sampling_params import SamplingParams
from s1engine.training import rows

Answers = dict[str, rows.Trace]


def ask_all(
    backend: Backend,
    prompts: Mapping[str, str],
    params: SamplingParams,
    file: Path,
    *,
    progress: bool = True,
) -> tuple[Answers, dict[str, str]]:
    """Answers and failures by id. ``file`` holds the answers of earlier calls, and afterwards
    these."""
    answers = read_answers(file)
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
                answers[name] = split(response.samples[0])
                line = {
                    "id": name,
                    "thinking": answers[name].thinking,
                    "attempt": answers[name].attempt,
                }
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                out.flush()
            bar.update()
    return {name: answers[name] for name in prompts if name in answers}, failures


def split(sample: EvalSample, answer_start: str = "<|im_start|>answer") -> rows.Trace:
    """Thinking and answer of a sample. A server gives them apart; a trace of our engine, or of a
    model that spells its delimiters out, is cut at them."""
    told = sample.segments[0][0] if len(sample.segments) > 1 else ""
    whole = "".join(text for text, _ in sample.segments)
    if answer_start in whole:
        told = whole.rpartition(answer_start)[0]
        told = told.rpartition("<|im_start|>think")[2]
    answer = sample.text.rpartition(answer_start)[2]
    return rows.Trace(told.strip(), answer.strip())


def read_answers(file: Path) -> Answers:
    """Answers of earlier calls; a last line that was cut short is dropped from the file."""
    found: Answers = {}
    if not file.exists():
        return found
    lines = file.read_text(encoding="utf-8").split("\n")
    good: list[rows.Json] = []
    for line in lines:
        try:
            row = json.loads(line)
            found[row["id"]] = rows.Trace(row["thinking"], row["attempt"])
            good.append(row)
        except (ValueError, KeyError, TypeError):
            continue
    rows.write_jsonl(file, good)
    return found
