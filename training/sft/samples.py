"""Rows to token ids: s1's training text, and where its loss begins.

The text is the chat template over question and completion. A completion is

    <|im_start|>think NL trace NL <|im_start|>answer NL answer

An answer without "Answer:" gets the prefix "Answer: ". The loss starts at the first token after the
assistant's header and includes what the template writes after the turn (``<|im_end|>`` NL). Skipped
and truncated rows are counted.
"""

import collections
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from s1engine.errors import ModelError, RequestError
from s1engine.training.rows import Json, TeacherTrace, parse_row, read_jsonl
from s1engine.training.sft.sft_config import SftConfig


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """Token ids of one sample; the first ``num_prompt`` of them carry no loss."""

    ids: tuple[int, ...]
    num_prompt: int
    name: str
    """File and line, for error messages."""

    @property
    def loss_start(self) -> int:
        """Index of the first token that carries loss; the very first token has no context."""
        return max(self.num_prompt, 1)

    @property
    def num_targets(self) -> int:
        """Tokens that carry loss."""
        return len(self.ids) - self.loss_start


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """The samples to train on, in file order, and counts of all rows by outcome."""

    samples: tuple[TokenizedSample, ...]
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
    except Exception as error:  # transformers passes on any error of its parsers and the network
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


def format_completion(trace: TeacherTrace, config: SftConfig) -> str:
    """The assistant's turn."""
    answer = trace.attempt.strip()
    if "Answer:" not in answer:
        answer = f"Answer: {answer}"
    return f"{config.think_start}\n{trace.thinking.strip()}\n{config.answer_start}\n{answer}"


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, question: str, completion: str, name: str
) -> TokenizedSample:
    """One turn of a chat, with loss on the assistant's part.

    Prompt and completion are encoded separately. They meet at a special token or a newline, which
    no merge of the tokenizer crosses.
    """
    chat = [{"role": "user", "content": question}]
    prompt = _render(tokenizer, chat, add_generation_prompt=True)
    whole = _render(tokenizer, [*chat, {"role": "assistant", "content": completion}])
    if not whole.startswith(prompt):
        raise ModelError(
            "the chat template's generation prompt differs from the header of an assistant turn, "
            "so the start of the completion is unknown"
        )
    first = tokenizer.encode(prompt, add_special_tokens=False)
    rest = tokenizer.encode(whole[len(prompt) :], add_special_tokens=False)
    return TokenizedSample((*first, *rest), len(first), name)


def _render(tokenizer: PreTrainedTokenizerBase, chat: list[Any], **options: Any) -> str:
    text = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    assert isinstance(text, str)
    return text


def load_training_set(config: SftConfig, tokenizer: PreTrainedTokenizerBase) -> TrainingSet:
    """All samples of ``config.data``. Raises RequestError if none is left or a row is malformed."""
    counts: collections.Counter[str] = collections.Counter()
    samples: list[TokenizedSample] = []
    for file in map(Path, config.data):
        for number, given in read_jsonl(file, "data"):
            counts["rows"] += 1
            sample = _encode_row(given, f"{file.name}:{number}", config, tokenizer)
            if sample is None:
                counts["without a trace"] += 1
            else:
                samples.append(sample)
    kept = tuple(_fit_to_block(samples, config, counts))
    if not kept:
        outcome = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise RequestError(f"data: no sample to train on ({outcome or 'no rows'})", param="data")
    return TrainingSet(kept, dict(counts))


def _encode_row(
    given: Json, name: str, config: SftConfig, tokenizer: PreTrainedTokenizerBase
) -> TokenizedSample | None:
    """None for a row without a trace."""
    if isinstance(given.get("text"), str) and "question" not in given:
        ids = tokenizer.encode(given["text"], add_special_tokens=False)
        return TokenizedSample(tuple(ids), 0, name)
    try:
        row = parse_row(given)
    except ValueError as error:
        raise RequestError(f"data: {name}: {error}", param="data") from error
    if isinstance(given.get("completion"), str):
        return encode_chat(tokenizer, row.question, given["completion"], name)
    trace = row.trace(config.teacher)
    if trace is None or not trace.thinking.strip() or not trace.attempt.strip():
        return None
    return encode_chat(tokenizer, row.question, format_completion(trace, config), name)


def _fit_to_block(
    samples: Iterable[TokenizedSample], config: SftConfig, counts: collections.Counter[str]
) -> Iterable[TokenizedSample]:
    """Yields samples that fit the block and carry loss; counts the others in ``counts``."""
    for sample in samples:
        if len(sample.ids) > config.block_size:
            if config.too_long == "error":
                reason = f"{sample.name} has {len(sample.ids)} tokens"
                raise RequestError(f"block_size {config.block_size}: {reason}", param="block_size")
            outcome = "dropped" if config.too_long == "drop" else "truncated"
            counts[f"longer than block_size, {outcome}"] += 1
            if config.too_long == "drop":
                continue
            ids = sample.ids[: config.block_size]
            sample = TokenizedSample(ids, sample.num_prompt, sample.name)
        if sample.num_targets < 1:
            counts["without a completion"] += 1
            continue
        yield sample
