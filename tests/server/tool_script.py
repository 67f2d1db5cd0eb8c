"""Tools, scripted answers that call them, and an engine that gives these answers."""

from collections.abc import AsyncGenerator
from typing import Any

from s1engine.engine.async_engine import AsyncLLMEngine
from s1engine.engine.request import Request
from s1engine.outputs import (
    Chunk,
    CompletionOutput,
    RequestOutput,
    ThinkingUsage,
    Timing,
    Usage,
)

TEMPLATE = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
PARAMETERS = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}
FUNCTIONS = [
    {"name": "add", "description": "Adds.", "parameters": PARAMETERS},
    {"name": "stop_it", "parameters": {"type": "object", "additionalProperties": False}},
]
TOOLS: list[Any] = [{"type": "function", "function": function} for function in FUNCTIONS]
CHAT: list[Any] = [{"role": "user", "content": "a=3 b=a+4 b?"}]
HISTORY: list[Any] = [
    {"role": "user", "content": "How warm is it in Oslo and Rome?"},
    {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            {
                "id": f"c{i}",
                "type": "function",
                "function": {"name": "add", "arguments": f'{{"n": {i}, "city": "{city}"}}'},
            }
            for i, city in enumerate(("Østfold", "Rome"))
        ],
    },
    {"role": "tool", "tool_call_id": "c0", "content": "3"},
    {"role": "tool", "tool_call_id": "c1", "content": '{"t": 21}'},
    {"role": "user", "content": "Which is warmer?"},
]
THOUGHT = '<tool_call>\n{"name": "no", "arguments": {}}\n</tool_call> but no'
SAID = (
    'Well.\n<tool_call>\n{"name": "add", "arguments": {"n": 7}}\n</tool_call>\n'
    '<tool_call>\n{"name": "stop_it", "arguments": {}}\n</tool_call>'
)
CALLS = [("add", '{"n": 7}'), ("stop_it", "{}")]


class Scripted:
    """The bundled model, but for requests of a script: those are answered with it, three
    characters at a time."""

    def __init__(self, engine: AsyncLLMEngine) -> None:
        self._engine = engine
        self.said: str | None = None
        self.stop_reason: str | None = None
        self.finish_reason = "stop"
        self.asked: list[Request] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate_request(self, request: Request) -> AsyncGenerator[Any, None]:
        self.asked.append(request)
        if self.said is None:
            async for event in self._engine.generate_request(request):
                yield event
            return
        said, n = self.said, 3
        if request.stream:
            yield Chunk(0, reasoning=THOUGHT)
            for at in range(0, len(said), n):
                last = self.finish_reason if at + n >= len(said) else None
                yield Chunk(0, text=said[at : at + n], finish_reason=last)
        thinking = ThinkingUsage(9, 0, 0, "natural", 99)
        sample = CompletionOutput(
            0, said, THOUGHT, [], [], self.finish_reason, self.stop_reason, thinking, None
        )
        yield RequestOutput(
            request.request_id, [1], [sample], Usage(1, 1, 0, 9), Timing(0.1, 0.2, 0.3), []
        )
