"""A batch job: threads share one engine, each answer is written as it finishes, a rerun resumes.

    python examples/batch_job.py OUT.jsonl [--limit 8] [--model MODEL]

A question whose answer is in OUT.jsonl is not asked again, so a job may be interrupted.
Prints how many answers were there, how many are new, and how many tokens were generated.
"""

import argparse
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from s1engine import LLM, CheckpointOutput, Chunk, SamplingParams

QUESTIONS = [f"k={i} b=k+4 x=b*2 x?" for i in range(8)]
PARAMS = SamplingParams(temperature=0, max_tokens=256)


class Job:
    """Appends answers to a file; any thread may call it."""

    def __init__(self, llm: LLM, path: Path) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        self.done = {json.loads(line)["question"] for line in lines if line.endswith("}")}
        self.num_tokens = 0
        self._llm, self._path, self._lock = llm, path, threading.Lock()

    def answer(self, question: str) -> None:
        """Answers one question and writes one line."""
        chat = [{"role": "user", "content": question}]
        (output,) = self._llm.chat(chat, PARAMS, on_chunk=self._count)
        row = {"question": question, "answer": output.outputs[0].text.strip()}
        with self._lock, self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _count(self, prompt: int, chunk: Chunk | CheckpointOutput) -> None:
        if isinstance(chunk, Chunk):
            with self._lock:
                self.num_tokens += len(chunk.token_ids)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, default=len(QUESTIONS))
    parser.add_argument("--model")
    args = parser.parse_args()
    with LLM(args.model) as llm, ThreadPoolExecutor(4) as threads:
        job = Job(llm, args.out)
        missing = [question for question in QUESTIONS[: args.limit] if question not in job.done]
        list(threads.map(job.answer, missing))
    print(f"{len(job.done)} answers found, {len(missing)} new, {job.num_tokens} tokens generated")


if __name__ == "__main__":
    main()
