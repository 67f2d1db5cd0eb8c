"""What a user may not write: ``mypy --strict`` finds an error in each marked line, no other one."""

from s1engine import LLM, AsyncLLMEngine, Chunk, EngineConfig, SamplingParams, ThinkingBudget

llm = LLM(max_seqs=8)  # error
llm = LLM(dtype="float31")  # error
llm = LLM(max_num_seqs="8")  # error
engine = AsyncLLMEngine(max_seqs=8)  # error
config = EngineConfig(device="gpu")  # error
params = SamplingParams(heat=0.0)  # error
params = SamplingParams(regex=b"a")  # error
params = SamplingParams(thinking={"max_tokens": 4})  # error
budget = ThinkingBudget(checkpoints="12")  # error

llm.generate("a", prioritty=1)  # error
llm.generate("a", priority="1")  # error
llm.generate(None)  # error
llm.generate("a", {"temperature": 0.0})  # error
llm.stream("a", params, on_text=print)  # error
llm.chat("hello")  # error


def ended(chunk: Chunk) -> bool:
    return chunk.finish_reason == "too long"  # error
