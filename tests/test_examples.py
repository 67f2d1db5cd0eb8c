"""examples/: each program runs on the bundled model and prints what its docstring says."""

import json
import subprocess
import sys
from pathlib import Path

from tests.real_model import real_model_file
from tests.server.conftest import start_server

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TIMEOUT_S = 240


def run_example(name: str, *arguments: str) -> list[str]:
    """Runs an example; returns its lines on stdout."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_every_example_is_short_and_tested() -> None:
    source = Path(__file__).read_text()
    programs = sorted(EXAMPLES.glob("*.py"))
    assert len(programs) == 8
    for program in programs:
        assert f'"{program.name}"' in source
        assert len(program.read_text().splitlines()) < 70


def test_offline() -> None:
    unlimited, cut, at_once, waited = run_example("offline.py")
    assert unlimited == (
        "budget none, waits 0: 21 thinking tokens, ended by natural: Final Answer: 4"
    )
    assert cut.startswith("budget 10, waits 0: 10 thinking tokens, ended by budget: Final Answer:")
    assert at_once.startswith(
        "budget 0, waits 0: 0 thinking tokens, ended by budget: Final Answer:"
    )
    assert waited.startswith("budget none, waits 1: ") and waited.endswith("Final Answer: 4")


def test_real_chat() -> None:
    plain, thought, waited, cut = run_example("real_chat.py", str(real_model_file()))
    assert plain == "plain: 'The capital of France is Paris.'"
    assert thought.startswith("budget 32, 0 waits: ") and " ended by natural; " in thought
    assert waited.startswith("budget 32, 1 waits: ") and "Wait" in waited
    assert cut.startswith("budget 5, 0 waits: ") and " ended by budget; 'Final Answer:" in cut


def test_budget_sweep() -> None:
    header, *rows = run_example("budget_sweep.py")
    assert header.split() == ["budget", "thinking", "answer"]
    cells = [row.split(maxsplit=2) for row in rows]
    assert [budget for budget, _, _ in cells] == ["0", "16", "32", "40", "none"]
    thinking = [int(tokens) for _, tokens, _ in cells]
    assert thinking[:3] == [0, 16, 32] and thinking[3] == thinking[4] <= 40
    assert all(answer.startswith("Final Answer: ") for _, _, answer in cells)
    assert cells[3][2] == cells[4][2] == "Final Answer: 5"


def test_budget_sweep_of_another_question() -> None:
    _, *rows = run_example("budget_sweep.py", "k=3 b=k+4 x=b*2 x?", "--budgets", "4,64")
    assert [row.split()[:2] for row in rows] == [["4", "4"], ["64", "21"], ["none", "21"]]
    assert [row.split()[-1] for row in rows[1:]] == ["4", "4"]


def test_async_embedding() -> None:
    lines = sorted(run_example("async_embedding.py"))
    cancelled, ended, streamed = lines
    assert cancelled.startswith("cancelled after ") and 20 <= int(cancelled.split()[2]) < 1024
    assert ended.startswith("ended by client: Final Answer: ")
    assert streamed == "streamed: Final Answer: 4"


def test_voice_agent() -> None:
    first, second, third = run_example("voice_agent.py", "--first-token-ms", "600000")
    assert first == "k=3 b=k+4 b? -> Final Answer: 7 (stop)"
    assert second == "k=3 b=k+4 x=b*2 x? -> Final (interrupted)"
    assert third == "a=2 c=a+1 c? -> Final Answer: 3 (stop)"


def test_editor() -> None:
    typed, reused = run_example("editor.py")
    assert typed == "typed 'k=3 b=k+4 x=b*2 x?'; 17 completions cancelled"
    assert int(reused.split()[1]) >= 160 and " of 189 tokens: " in reused


def test_batch_job(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    (first,) = run_example("batch_job.py", str(out), "--limit", "3")
    (second,) = run_example("batch_job.py", str(out))
    assert first.startswith("0 answers found, 3 new, ")
    assert second.startswith("3 answers found, 5 new, ")
    answers = {row["question"][2]: row["answer"] for row in map(json.loads, out.open())}
    assert answers == {str(k): f"Final Answer: {(k + 4) * 2 % 10}" for k in range(8)}


def test_tool_use() -> None:
    flags = ("--api-key", "secret")
    template = str(EXAMPLES / "tools.jinja")
    process, url, log = start_server("--dtype", "float32", "--chat-template", template, *flags)
    try:
        call, result, answer = run_example("tool_use.py", "--base-url", f"{url}/v1", *flags)
    finally:
        process.terminate()
        assert process.wait(30) == 0, "".join(log)
    arguments = json.loads(call.removeprefix("call: draw_question(").removesuffix(")"))
    question, value = {
        2: ("k=3 b=k+4 b?", 7),
        3: ("k=3 b=k+4 x=b*2 x?", 4),
        4: ("k=3 b=k+4 x=b*2 d=x-1 d?", 3),
    }[arguments["steps"]]
    assert (result, answer) == (f"result: {question}", f"answer: Final Answer: {value}")
