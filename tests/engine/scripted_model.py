"""An engine whose model writes what a script says: tiny random weights compute, and the tokens that
they sample are replaced. Everything else is real: scheduler, budgets, output."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from s1engine.engine.llm import LLM
from s1engine.engine.llm_engine import LLMEngine
from s1engine.outputs import Chunk, CompletionOutput, RequestOutput
from s1engine.runner.interface import ModelRunnerOutput, SchedulerOutput
from s1engine.sampling_params import SamplingParams
from tests.tiny_models import make_model
from tests.tiny_tokenizer import CHATML, TEMPLATE, make_backend

CHAT: list[Any] = [{"role": "user", "content": "why?"}]
SIZES: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 1}
TOOL_TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATE


def save_model(folder: Path, tokens: tuple[str, ...]) -> Path:
    """Writes a tiny model with ``tokens`` of their own besides ChatML's; special ones if they begin
    with ``<|``."""
    special = tuple(token for token in tokens if token.startswith("<|"))
    visible = tuple(token for token in tokens if token not in special)
    backend = make_backend((*CHATML, *special), visible)
    sizes = {"vocab_size": backend.get_vocab_size()}
    path = make_model(folder, "llama", eos_token_id=backend.token_to_id(CHATML[2]), **sizes)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=CHATML[2], chat_template=TOOL_TEMPLATE
    ).save_pretrained(path)
    return path


class Script:
    """What the model of an engine samples next; then it ends its turn."""

    def __init__(self, engine: LLMEngine) -> None:
        self.ids: list[int] = []
        self._end = engine.tokenizer.encode(CHATML[2])[0]
        self._execute = engine.runner.execute
        engine.runner.execute = self._write  # type: ignore[method-assign]
        engine.runner.decode_loop = None  # which executes steps by itself

    def _write(self, step: SchedulerOutput) -> ModelRunnerOutput:
        output = self._execute(step)
        for i in range(len(output.token_ids)):
            output.token_ids[i] = self.ids.pop(0) if self.ids else self._end
        return output


class ScriptedModel:
    """One engine with one reasoning format.

    Args:
        tokens: see ``save_model``.
        options: of EngineConfig.
    """

    def __init__(self, folder: Path, tokens: tuple[str, ...], **options: Any) -> None:
        path = str(save_model(folder, tokens))
        self.llm = LLM(path, progress=False, **SIZES, **options)
        self.tokenizer = self.llm.engine.tokenizer
        self._script = Script(self.llm.engine)

    def answer(
        self,
        script: list[int],
        params: SamplingParams | None = None,
        prompt: Any = None,
        **options: Any,
    ) -> CompletionOutput:
        """The output of a chat in which the model samples ``script`` and then ends its turn. It is
        the same whole and streamed, with stop strings that never occur, and with
        log-probabilities: asserted."""
        params = params or SamplingParams()
        whole = self._generate(script, params, prompt, options)
        requested = self.llm.engine.make_request(prompt or CHAT, params, stream=True, **options)
        self._script.ids = list(script)
        events = list(self.llm.generate_request(requested))
        chunks = [event for event in events if isinstance(event, Chunk)]
        (output,) = [event for event in events if isinstance(event, RequestOutput)]
        assert output.outputs[0] == whole
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert "".join(chunk.reasoning for chunk in chunks) == (whole.reasoning or "")
        assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
        fields = {name: getattr(params, name) for name in ("max_tokens", "thinking", "stop")}
        fields |= {"stop": (*params.stop, "\x00never"), "logprobs": 0}
        detailed = self._generate(script, SamplingParams(**fields), prompt, options)
        assert detailed.text == whole.text and detailed.token_ids == whole.token_ids
        assert detailed.logprobs is not None
        assert [entry.token_id for entry in detailed.logprobs] == whole.token_ids
        return whole

    def _generate(
        self, script: list[int], params: SamplingParams, prompt: Any, options: dict[str, Any]
    ) -> CompletionOutput:
        self._script.ids = list(script)
        request = self.llm.engine.make_request(prompt or CHAT, params, **options)
        (output,) = self.llm.generate_requests([request], progress=False)
        return output.outputs[0]
