"""Rows to token ids: s1's training text, and where its loss begins.

The text is the chat template over question and completion, and a completion is

    <|im_start|>think NL trace NL <|im_start|>answer NL answer

with "Answer: " before an answer that does not say "Answer:" itself. Loss begins with the first
token after the assistant's header and ends with what the template puts after the turn
(``<|im_end|>`` NL). Rows without a trace and samples beyond the block are counted, never passed
over in silence.
"""

import collections
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from s1engine.errors import ModelError, RequestError
from s1engine.training import rows
from s1engine.training.sft.sft_config import SftConfig


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of one sample; the first ``num_prompt`` of them carry no loss."""

    ids: tuple[int, ...]
    num_prompt: int
    name: str
    """File and line, to name it in an error."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """The samples to train on, in file order, and what became of the other rows."""

    samples: tuple[Sample, ...]
    counts: dict[str, int]

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.ids) for sample in self.samples)


def load_tokenizer(config: SftConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, checked for the delimiters. Raises ModelError or RequestError."""
    name = config.tokenizer or config.model
    assert name is not None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers and the network raise
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{name}: the tokenizer cannot be loaded: {reason}") from error
    if tokenizer.chat_template is None:
        raise ModelError(f"{name}: the tokenizer has no chat template")
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for param in ("think_start", "answer_start"):
        delimiter = getattr(config, param)
        if not any(delimiter.startswith(token) for token in special):
            reason = f"{delimiter!r} begins with no special token of {name}'s tokenizer"
            raise RequestError(f"{param}: {reason}", param=param)
    return tokenizer


def completion(trace: rows.Trace, config: SftConfig) -> str:
    """The assistant's turn."""
    answer = trace.attempt.strip()
    if "Answer:" not in answer:
        answer = f"Answer: {answer}"
    return f"{config.think_start}\n{trace.thinking.strip()}\n{config.answer_start}\n{answer}"


def encode(tokenizer: PreTrainedTokenizerBase, question: str, answer: str, name: str) -> Sample:
    """One turn of a chat, loss on the assistant's part.

    Prompt and completion are encoded apart; they meet at a special token or a newline, where no
    merge reaches across.
    """
    chat = [{"role": "user", "content": question}]
    prompt = _render(tokenizer, chat, add_generation_prompt=True)
    whole = _render(tokenizer, [*chat, {"role": "assistant", "content": answer}])
    if not whole.startswith(prompt):
        raise ModelError(
            "the chat template writes another header before an assistant's turn than it opens one "
            "with, so where the completion begins cannot be told"
        )
    first = tokenizer.encode(prompt, add_special_tokens=False)
    rest = tokenizer.encode(whole[len(prompt) :], add_special_tokens=False)
    return Sample((*first, *rest), len(first), name)


def _render(tokenizer: PreTrainedTokenizerBase, chat: list[Any], **how: Any) -> str:
    text = tokenizer.apply_chat_template(chat, tokenize=False, **how)
    assert isinstance(text, str)
    return text


def load(config: SftConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """All samples of ``config.data``. Raises RequestError if none is left or a row is malformed."""
    counts: collections.Counter[str] = collections.Counter()
    samples: list[Sample] = []
    for file in map(Path, config.data):
        for number, given in rows.read_jsonl(file, "data"):
            counts["rows"] += 1
            sample = _sample(given, f"{file.name}:{number}", config, tokenizer)
            if sample is None:
                counts["without a trace"] += 1
            else:
                samples.append(sample)
    kept = tuple(fit(samples, config, counts))
    if not kept:
        told = ", ".join(f"{count} {what}" for what, count in counts.items())
        raise RequestError(f"data: no sample to train on ({told or 'no rows'})", param="data")
    return Dataset(kept, dict(counts))


def _sample(
    given: rows.Json, name: str, config: SftConfig, tokenizer: PreTrainedTokenizerBase
) -> Sample | None:
    if isinstance(given.get("text"), str) and "question" not in given:
        return Sample(tuple(tokenizer.encode(given["text"], add_special_tokens=False)), 0, name)
    try:
        row = rows.from_json(given)
    except ValueError as error:
        raise RequestError(f"data: {name}: {error}", param="data") from error
    if isinstance(given.get("completion"), str):
        return encode(tokenizer, row.question, given["completion"], name)
    trace = row.trace(config.teacher)
    if trace is None or not trace.thinking.strip() or not trace.attempt.strip():
        return None
    return encode(tokenizer, row.question, completion(trace, config), name)


def fit(
    samples: Iterable[Sample], config: SftConfig, counts: collections.Counter[str]
) -> Iterable[Sample]:
    """Samples that fit the block and have something to learn; the others are counted."""
    for sample in samples:
        if len(sample.ids) > config.block_size:
            if config.too_long == "error":
                reason = f"{sample.name} has {len(sample.ids)} tokens"
                raise RequestError(f"block_size {config.block_size}: {reason}", param="block_size")
            verb = "dropped" if config.too_long == "drop" else "truncated"
            counts[f"longer than block_size, {verb}"] += 1
            if config.too_long == "drop":
                continue
            sample = Sample(sample.ids[: config.block_size], sample.num_prompt, sample.name)
        if max(sample.num_prompt, 1) >= len(sample.ids):
            counts["without a completion"] += 1
            continue
        yield sample
