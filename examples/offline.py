"""Answer a batch of chats in this process, each with its own thinking budget.

    python examples/offline.py [MODEL]

MODEL is a Hugging Face directory or hub id; the default is the bundled s1-nano, which solves chains
of arithmetic modulo 10. Prints one line per chat: budget, thinking tokens, why the thinking ended,
and the answer.
"""

import sys

from s1engine import LLM, SamplingParams, ThinkingBudget

REQUESTS = [
    ("k=3 b=k+4 x=b*2 x?", ThinkingBudget()),  # no limit
    ("k=3 b=k+4 x=b*2 x?", ThinkingBudget(max_tokens=10)),  # cut after 10 thinking tokens
    ("k=3 b=k+4 x=b*2 x?", ThinkingBudget(max_tokens=0)),  # answer at once
    ("k=3 b=k+4 x=b*2 x?", ThinkingBudget(num_waits=1)),  # continue once with "Wait"
]


def main() -> None:
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None, progress=False)
    chats = [[{"role": "user", "content": question}] for question, _ in REQUESTS]
    params = [
        SamplingParams(temperature=0, max_tokens=256, thinking=budget) for _, budget in REQUESTS
    ]
    for (_, budget), output in zip(REQUESTS, llm.chat(chats, params, progress=False), strict=True):
        sample = output.outputs[0]
        assert sample.thinking is not None
        limit = "none" if budget.max_tokens is None else budget.max_tokens
        print(
            f"budget {limit}, waits {sample.thinking.waits_used}: {sample.thinking.tokens} thinking"
            f" tokens, ended by {sample.thinking.end_reason}: {sample.text.strip()}"
        )


if __name__ == "__main__":
    main()
