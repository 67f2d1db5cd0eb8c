"""The engine behind plain calls: any thread generates, streams and cancels; each caller waits for
its own requests.

A wait ends with an interrupt (Ctrl-C) or an exception of a callback as well: the requests of that
call are aborted, and the engine stays usable.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Self, TypeVar, Unpack

from s1engine.engine.embedded import EmbeddedEngine
from s1engine.engine.engine_thread import EngineThread, MailQueue, Submission, result_of
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.prefix import PinnedPrefix, prefill
from s1engine.engine.prompts import (
    numbered_errors,
    params_of_each,
    plain_messages,
    split_conversations,
    split_prompts,
)
from s1engine.engine.request import Request
from s1engine.engine.request_stream import RequestStream
from s1engine.engine.session import RestoredSession, restore_session, save_session
from s1engine.engine.warm_up import WARM_SEQS, warm_up
from s1engine.errors import EngineDeadError
from s1engine.options import EngineOptions, Message, Prompt, RequestOptions, engine_config
from s1engine.outputs import CheckpointOutput, Chunk, RequestOutput
from s1engine.sampling_params import SamplingParams

OnChunk = Callable[[int, Chunk | CheckpointOutput], object]
T = TypeVar("T")


class LLM(EmbeddedEngine):
    """A model in this process. Any thread may call any method.

    ``with LLM(...) as llm:`` closes it at the end. After ``close``, ``start`` loads it again.

    Args:
        model: Hugging Face directory or hub id; None: the bundled s1-nano.
        progress: show a bar while weights load.
        options: further fields of EngineConfig.

    Raises:
        ModelError: the model directory is missing, damaged or not supported.
        RequestError: an option is wrong, or does not fit the model or the machine.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        progress: bool = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(engine_config(model, options), progress=progress)
        self.start()

    def start(self) -> None:
        """Loads the model again after ``close`` or a failure; does nothing if the engine runs."""
        self._open()

    def close(self) -> None:
        """Ends the engine after its present step and frees its memory; does nothing if it is
        closed. Calls that wait, and later ones, raise EngineDeadError."""
        self._close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- whole outputs ---

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        on_chunk: OnChunk | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[RequestOutput]:
        """Continues raw prompts: a text, token ids, or an iterable of them. The chat template is
        not applied, and thinking is opened only if ``params`` has a thinking budget.

        ``on_chunk(index of the prompt, chunk)`` is called in this thread for each chunk and
        checkpoint; an exception of it cancels all prompts of the call. ``progress`` shows a bar.
        ``options`` are those of ``make_request``. Outputs are in the order of the prompts. If any
        request is invalid, raises RequestError before anything is computed. Raises
        RequestFailedError if the engine fails with one request, EngineDeadError if it has ended.
        """
        return self._generate(split_prompts(prompts), params, progress, on_chunk, options)

    def chat(
        self,
        conversations: Sequence[Message] | Iterable[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        on_chunk: OnChunk | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[RequestOutput]:
        """Answers conversations, each a list of ``{"role", "content"}``; see ``generate``."""
        chats = split_conversations(conversations)
        return self._generate(chats, params, progress, on_chunk, options)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
        on_chunk: OnChunk | None,
        options: RequestOptions,
    ) -> list[RequestOutput]:
        each = params_of_each(params, len(prompts))
        stream = on_chunk is not None
        requests = []
        for i, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            with numbered_errors(i, len(prompts)):
                requests.append(self._compile(prompt, own, stream, options))
        return self.generate_requests(requests, progress=progress, on_chunk=on_chunk)

    def generate_requests(
        self,
        requests: Sequence[Request],
        *,
        progress: bool = False,
        on_chunk: OnChunk | None = None,
    ) -> list[RequestOutput]:
        """Generates requests of ``make_request`` concurrently; ``on_chunk`` gets the chunks of
        those made with ``stream=True``. Raises as ``generate``."""
        thread = self.thread
        mail = MailQueue()
        submissions = [Submission(request, mail.put, i) for i, request in enumerate(requests)]
        outputs: dict[int, RequestOutput] = {}
        bar = _RateBar(thread, len(requests)) if progress else None
        try:
            thread.submit(submissions)
            while len(outputs) < len(requests):
                for submission, event in mail.receive():
                    if isinstance(event, Exception):
                        raise event
                    if isinstance(event, RequestOutput):
                        outputs[submission.reader] = event
                    elif on_chunk is not None:
                        on_chunk(submission.reader, event)
                if bar is not None:
                    bar.show(len(outputs))
        except BaseException:
            abort(thread, submissions)
            raise
        finally:
            if bar is not None:
                bar.close()
        return [outputs[i] for i in range(len(requests))]

    # --- streams ---

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> RequestStream:
        """An iterator of the chunks and checkpoints of one prompt, then its RequestOutput. The
        prompt is read as in ``generate``; the request starts at once.

        Any number of streams may be read by turns. Closing the stream, leaving its ``with`` block
        or dropping it aborts the request; so does an exception raised while it waits.
        """
        return self.generate_request(self._compile(prompt, params, True, options))

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> RequestStream:
        """The same for one conversation; see ``chat``."""
        return self.stream(plain_messages(messages), params, **options)

    def generate_request(self, request: Request) -> RequestStream:
        """The same for a request of ``make_request``, which has chunks if made with
        ``stream=True``."""
        return RequestStream(self, self.thread, request)

    # --- prefixes, sessions, warm-up ---

    def prefill(
        self, prompt: Prompt | RequestOutput, **options: Unpack[RequestOptions]
    ) -> PinnedPrefix:
        """Computes the leading tokens of later prompts and keeps them until the PinnedPrefix is
        released: whole blocks, found by requests with the same ``cache_salt``.

        A chat is rendered without the header of the assistant's next turn. Raises RequestError if
        the prompt has no whole block, or if too much would be pinned: pins take at most half the
        KV cache, and leave room for one request of max_model_len."""
        return prefill(self, prompt, options)

    def save_session(
        self,
        prompt: Prompt | RequestOutput,
        path: str | os.PathLike[str],
        **options: Unpack[RequestOptions],
    ) -> int:
        """Writes what the prefix cache holds of a prompt, or of a finished request, to a
        safetensors file; computes nothing. Returns the number of tokens with KV: whole blocks.

        The file has the tokens, and no salt. It is replaced whole or not at all. Raises
        RequestError if nothing is cached, or if the file cannot be written."""
        return save_session(self, prompt, path, options)

    def restore_session(
        self, path: str | os.PathLike[str], *, pin: bool = False, cache_salt: str | None = None
    ) -> RestoredSession:
        """Enters a saved session into the prefix cache, from where requests with ``cache_salt``
        continue as if it had never left; ``pin`` keeps it there.

        Raises RequestError, and changes nothing, unless the file is whole, of the same model
        computed in the same way, and fits into the free part of the cache."""
        return restore_session(self, path, pin, {"cache_salt": cache_salt})

    def warmup(self, num_seqs: int = WARM_SEQS) -> None:
        """Prepares what the first requests would: recorded decode steps of up to ``num_seqs``
        sequences, weights in memory, chat template. Changes no output and leaves nothing in the
        cache. Raises RequestError."""
        warm_up(self, num_seqs)

    # --- live requests ---

    def cancel(self, request_id: str) -> bool:
        """Ends a live request; its caller gets the output so far, with the finish reason "abort".
        False if there is no such request."""
        return result_of(self.thread.cancel(request_id))

    def end_thinking(self, request_id: str) -> bool:
        """Makes a live request answer now. False if there is no such request."""
        return self.call(lambda engine: engine.end_thinking(request_id))

    def call(self, function: Callable[[LLMEngine], T]) -> T:
        """Calls ``function(engine)`` on the engine's thread, between two steps, and waits. Raises
        what it raises."""
        return self.thread.call(function)


def abort(thread: EngineThread, submissions: Sequence[Submission]) -> None:
    """Aborts requests and waits until they are gone."""
    with contextlib.suppress(EngineDeadError):
        result_of(thread.abort(submissions))


class _RateBar:
    """A bar on stderr: requests finished, and tokens per second of the whole engine."""

    def __init__(self, thread: EngineThread, total: int) -> None:
        from tqdm import tqdm

        self._thread = thread
        self._began, self._before = time.monotonic(), thread.stats.num_sampled_tokens
        self._bar = tqdm(total=total, unit="request")

    def show(self, finished: int) -> None:
        """Shows that so many requests have finished."""
        tokens = self._thread.stats.num_sampled_tokens - self._before
        rate = tokens / max(time.monotonic() - self._began, 1e-9)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(finished - self._bar.n)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
