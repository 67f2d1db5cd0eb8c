"""Offline use: all prompts in, all answers out."""

from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from s1engine.config import EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.request import Prompt, Request
from s1engine.errors import RequestError, RequestFailedError
from s1engine.outputs import CheckpointOutput, Chunk, RequestOutput
from s1engine.sampling_params import SamplingParams

Messages = list[dict[str, Any]]


class LLM:
    """A model in this process.

    Args:
        model: Hugging Face directory or hub id; None: the bundled s1-nano.
        options: further fields of EngineConfig.
    """

    def __init__(self, model: str | None = None, *, progress: bool = True, **options: Any) -> None:
        if model is not None:
            options["model"] = str(model)
        self.engine = LLMEngine(EngineConfig(**options), progress=progress)

    def close(self) -> None:
        """Ends the processes of other ranks; otherwise they end with the garbage collection."""
        self.engine.close()

    def generate(
        self,
        prompts: Prompt | list[str] | list[list[int]],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        progress: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Continues raw prompts, texts or lists of token ids. The chat template is not applied, and
        thinking is opened only if ``params`` has a thinking budget.

        ``options`` are those of ``LLMEngine.make_request``. Outputs are in the order of the
        prompts. If any request is invalid, raises RequestError before anything is computed.
        """
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        batch: list[Any] = [prompts] if single else list(prompts)
        return self._generate(batch, params, progress, options)

    def chat(
        self,
        conversations: Messages | list[Messages],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        progress: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answers conversations, each a list of ``{"role", "content"}``; see ``generate``."""
        single = bool(conversations) and isinstance(conversations[0], dict)
        batch: list[Any] = [conversations] if single else list(conversations)
        return self._generate(batch, params, progress, options)

    def _generate(
        self,
        prompts: list[Prompt],
        params: SamplingParams | list[SamplingParams] | None,
        progress: bool,
        options: dict[str, Any],
    ) -> list[RequestOutput]:
        if params is None:
            params = SamplingParams(**self.engine.default_sampling())
        each = params if isinstance(params, list) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(f"{len(each)} params for {len(prompts)} prompts", param="params")
        requests = [
            self.engine.make_request(prompt, p, **options)
            for prompt, p in zip(prompts, each, strict=True)
        ]
        return self.generate_requests(requests, progress=progress)

    def generate_request(
        self, request: Request
    ) -> Iterator[Chunk | CheckpointOutput | RequestOutput]:
        """Yields chunks and checkpoints of a request made with ``stream=True``, then its output.
        Closing the iterator aborts the request."""
        self.engine.add_request(request)
        try:
            while self.engine.has_unfinished:
                for _, event in self.engine.step():
                    if isinstance(event, RequestFailedError):
                        raise event
                    yield event
        finally:
            self.engine.abort(request.request_id)

    def generate_requests(
        self, requests: list[Request], *, progress: bool = True
    ) -> list[RequestOutput]:
        """Generates requests of ``LLMEngine.make_request`` concurrently. Raises RequestFailedError
        if the engine fails with one of them."""
        outputs: dict[str, RequestOutput] = {}
        for request in requests:
            self.engine.add_request(request)
        before = self.engine.scheduler.stats().num_sampled_tokens
        with tqdm(total=len(requests), unit="request", disable=not progress) as bar:
            try:
                while self.engine.has_unfinished:
                    for request_id, event in self.engine.step():
                        if isinstance(event, RequestFailedError):
                            raise event
                        if isinstance(event, RequestOutput):
                            outputs[request_id] = event
                            bar.update()
                    self._show_rate(bar, before)
            finally:  # an interrupt must not leave sequences behind
                for request in requests:
                    self.engine.abort(request.request_id)
        return [outputs[request.request_id] for request in requests]

    def _show_rate(self, bar: Any, before: int) -> None:
        if bar.disable:
            return
        elapsed = bar.format_dict["elapsed"]
        tokens = self.engine.scheduler.stats().num_sampled_tokens - before
        bar.set_postfix_str(f"{tokens / max(elapsed, 1e-9):,.0f} tokens/s", refresh=False)
