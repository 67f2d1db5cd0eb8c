"""Call a tool through OpenAI's client: the model's call, its result, the final answer.

    s1engine serve --chat-template examples/tools.jinja    # in another terminal
    python examples/tool_use.py --base-url http://127.0.0.1:8000/v1

The bundled s1-nano does not know tools, so ``tool_choice`` forces the call and the template shows
the model the tool's result as its next question. With a model that knows tools, omit
``--chat-template``. Prints the tool call, its result, and the answer. Needs ``pip install openai``.
"""

import argparse
import json
from typing import Any

from openai import OpenAI

QUESTIONS = {2: "k=3 b=k+4 b?", 3: "k=3 b=k+4 x=b*2 x?", 4: "k=3 b=k+4 x=b*2 d=x-1 d?"}
PARAMETERS = {
    "type": "object",
    "properties": {"steps": {"type": "integer", "enum": list(QUESTIONS)}},
    "required": ["steps"],
    "additionalProperties": False,
}
FUNCTION = {"name": "draw_question", "description": "Draws a question.", "parameters": PARAMETERS}
TOOLS: list[Any] = [{"type": "function", "function": FUNCTION}]


def main() -> None:
    parser = argparse.ArgumentParser(description="a tool call through OpenAI's client")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="-")
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": "Draw a question and answer it."}]
    choice: Any = {"type": "function", "function": {"name": "draw_question"}}
    reply = client.chat.completions.create(
        model=model, messages=messages, tools=TOOLS, tool_choice=choice, temperature=0
    ).choices[0].message  # fmt: skip
    call: Any = (reply.tool_calls or [])[0]
    print(f"call: {call.function.name}({call.function.arguments})")

    result = QUESTIONS[json.loads(call.function.arguments)["steps"]]
    print(f"result: {result}")
    messages += [reply, {"role": "tool", "tool_call_id": call.id, "content": result}]
    answer = client.chat.completions.create(
        model=model, messages=messages, tools=TOOLS, temperature=0
    )
    print(f"answer: {(answer.choices[0].message.content or '').strip()}")


if __name__ == "__main__":
    main()
