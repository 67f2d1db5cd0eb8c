"""Answer a question at several thinking budgets from a single trace.

    python examples/budget_sweep.py [QUESTION] [--model MODEL] [--budgets 0,16,32,40]

Each checkpoint branches off the running sequence and shares its KV blocks, so the sweep costs one
trace and short answers. Prints a table of budget, thinking tokens and answer; the last
row has no budget.
"""

import argparse

from s1engine import LLM, SamplingParams, ThinkingBudget


def main() -> None:
    parser = argparse.ArgumentParser(description="a budget sweep from one trace")
    parser.add_argument("question", nargs="?", default="a=3 b=a+4 c=b*2 d=c-9 e=d*7 e?")
    parser.add_argument("--model", help="Hugging Face directory or hub id; default s1-nano")
    parser.add_argument("--budgets", default="0,16,32,40")
    parser.add_argument("--max-tokens", type=int, default=256)
    args = parser.parse_args()

    budgets = tuple(int(budget) for budget in args.budgets.split(","))
    params = SamplingParams(
        temperature=0, max_tokens=args.max_tokens, thinking=ThinkingBudget(checkpoints=budgets)
    )
    llm = LLM(args.model, progress=False)
    chat = [{"role": "user", "content": args.question}]
    (output,) = llm.chat(chat, params, progress=False)

    rows = [(str(checkpoint.budget), checkpoint.output) for checkpoint in output.checkpoints]
    print("budget  thinking  answer")
    for budget, sample in [*rows, ("none", output.outputs[0])]:
        tokens = sample.thinking.tokens if sample.thinking else 0
        print(f"{budget:>6}  {tokens:>8}  {sample.text.strip()}")


if __name__ == "__main__":
    main()
