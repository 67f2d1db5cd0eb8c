"""A voice agent: speaks while the model writes, starts in time, and stops when it is interrupted.

    python examples/voice_agent.py [--model MODEL] [--first-token-ms 700]

``Speaker`` stands for text-to-speech. In the second turn the listener interrupts after one word.
Prints one line for each turn: what was said, and why it ended.
"""

import argparse

from s1engine import LLM, Chunk, Message, RequestOutput, SamplingParams, ThinkingBudget

QUESTIONS = ("k=3 b=k+4 b?", "k=3 b=k+4 x=b*2 x?", "a=2 c=a+1 c?")


class Speaker:
    """Says whole words; a listener may interrupt after some of them."""

    def __init__(self, patience: int) -> None:
        self.words: list[str] = []
        self._rest = ""
        self._patience = patience

    def push(self, text: str) -> bool:
        """Says the words that are complete. True: the listener has interrupted."""
        *words, self._rest = (self._rest + text).split(" ")
        self.words += [word for word in words if word.strip()]
        return len(self.words) >= self._patience

    def flush(self) -> None:
        """Says the last word."""
        self.push(" ")


def take_turn(llm: LLM, chat: list[Message], params: SamplingParams, speaker: Speaker) -> str:
    """Speaks one answer; returns why it ended."""
    with llm.stream_chat(chat, params) as stream:
        for event in stream:
            if isinstance(event, Chunk) and speaker.push(event.text):
                return "interrupted"  # leaving the block cancels the request
            if isinstance(event, RequestOutput):
                speaker.flush()
                return event.outputs[0].finish_reason
    raise AssertionError("a stream ends with its output")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--first-token-ms", type=int, default=700)
    args = parser.parse_args()
    params = SamplingParams(
        temperature=0,
        max_tokens=256,
        first_token_deadline_ms=args.first_token_ms,  # a turn that begins later is dropped
        thinking=ThinkingBudget(max_tokens=64),
    )
    with LLM(args.model) as llm:
        llm.warmup()  # the first steps are slower
        for turn, question in enumerate(QUESTIONS):
            speaker = Speaker(patience=1 if turn == 1 else 1000)
            reason = take_turn(llm, [{"role": "user", "content": question}], params, speaker)
            print(f"{question} -> {' '.join(speaker.words)} ({reason})")


if __name__ == "__main__":
    main()
