"""smolagents: a model called and streamed, and an agent that calls tools until its final answer."""

from common import KEY, MODEL, QUESTION, URL, report
from smolagents import OpenAIModel, ToolCallingAgent, tool
from smolagents.monitoring import LogLevel


@tool
def forecast(city: str) -> str:
    """Weather.

    Args:
        city: where.
    """
    return f"rain in {city}"


model = OpenAIModel(model_id=MODEL, api_base=URL, api_key=KEY, temperature=0)
chat = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
whole = model.generate(chat)
streamed = "".join(part.content or "" for part in model.generate_stream(chat))
agent = ToolCallingAgent(
    tools=[forecast],
    model=OpenAIModel(model_id=MODEL, api_base=URL, api_key=KEY, max_tokens=400),
    max_steps=3,
    verbosity_level=LogLevel.OFF,
)
agent.run(QUESTION)
called = [call.name for step in agent.memory.steps for call in getattr(step, "tool_calls", 0) or ()]
report(
    text=whole.content,
    whole=whole.content,
    streamed=streamed,
    usage=[
        whole.token_usage.input_tokens,
        whole.token_usage.output_tokens,
        whole.token_usage.total_tokens,
    ],
    tool_names=called,
)
