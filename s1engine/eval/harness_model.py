"""The engine as a model of lm-evaluation-harness (package ``lm_eval``, which is optional).

Importing this module registers the name ``s1engine``.
"""

from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from s1engine.engine.llm import LLM
from s1engine.errors import RequestError
from s1engine.eval.harness import sampling_params


@register_model("s1engine")
class S1EngineLM(LM):  # type: ignore[misc]
    """Answers ``generate_until`` requests, all of them in one continuous batch.

    Args:
        pretrained: directory or hub id; None: the bundled s1-nano.
        think: open the thinking of chats, where the model has a reasoning format.
        options: further fields of EngineConfig. The batch is the engine's own matter, so the
            harness's batch sizes are not used.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        think: bool = True,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if device == "cpu":  # the harness says cuda by default, whether there is a GPU or not
            options["device"] = device
        self._llm = LLM(pretrained, progress=False, **options)
        self._think = think and self._llm.engine.format is not None
        self._is_chat = False

    @property
    def tokenizer_name(self) -> str:
        return self._llm.engine.config.model_name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Part of the harness's cache key. A template by another name cannot be chosen here."""
        if isinstance(chat_template, str) and chat_template:
            raise RequestError("choose a template by --model_args chat_template=FILE")
        return self.tokenizer_name if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as text, up to the header of the assistant's turn."""
        if not add_generation_prompt:
            raise RequestError("a chat that ends in an unfinished answer is not supported")
        self._is_chat = True
        return self._llm.engine.tokenizer.render_chat(chat_history)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers, without their thinking."""
        prompts = [str(request.args[0]) for request in requests]
        params = [sampling_params(request.args[1]) for request in requests]
        opened = True if self._think and self._is_chat else None
        outputs = self._llm.generate(
            prompts, params, progress=not disable_tqdm, enable_thinking=opened
        )
        texts = [output.outputs[0].text for output in outputs]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not supported: the engine reports log-probabilities of what it generates only."""
        raise NotImplementedError("s1engine scores no given text: choose tasks that generate")

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Not supported, see ``loglikelihood``."""
        raise NotImplementedError("s1engine scores no given text: choose tasks that generate")
