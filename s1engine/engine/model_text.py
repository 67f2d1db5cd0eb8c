"""What a model directory holds besides weights: tokenizer, thinking rule, ends of a turn.

Loaded by the process that compiles requests and by the one that steps. Knows no request.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from s1engine import _core
from s1engine.config import EngineConfig
from s1engine.engine.end_markers import make_core_format
from s1engine.engine.thinking_detection import detect_thinking
from s1engine.engine.thinking_rule import ThinkingRule
from s1engine.errors import ModelError
from s1engine.models.generation_config import read_generation_config, refuse_unsupported
from s1engine.models.implementation import read_facts
from s1engine.models.model_facts import ModelFacts
from s1engine.reasoning import ReasoningFormat
from s1engine.tokenizer import Tokenizer
from s1engine.tool_formats import HERMES, ToolFormat, find_tool_format

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelText:
    """Enough to turn requests into integers and integers into text, in a process that does not load
    the weights."""

    config: ModelFacts
    tokenizer: Tokenizer
    thinking: ThinkingRule
    eos_token_ids: tuple[int, ...]  # end a turn: those of both configs and of the tokenizer
    vocab_limit: int  # ids below it may be sampled; a prompt may use every row of the embedding
    tool_format: ToolFormat = HERMES

    @classmethod
    def load(cls, config: EngineConfig, path: Path) -> "ModelText":
        """Raises ModelError or RequestError."""
        model = read_facts(path, config.model_impl)
        if config.generation_config != "none":
            refuse_unsupported(read_generation_config(path))
        tokenizer = Tokenizer.from_dir(path, config.chat_template)
        ends = _end_token_ids(path, model, tokenizer)
        _check_vocabulary(path, model, tokenizer)
        thinking = detect_thinking(config, path, tokenizer, ends)
        name = thinking.format.name if thinking.format else "none"
        chats = "think" if thinking.by_default else "do not think"
        logger.info("reasoning format %s, chats %s: %s", name, chats, thinking.reason)
        tools = find_tool_format(config.tool_call_parser, tokenizer)
        logger.info("tool calls in the format %s", tools.name)
        limit = min(tokenizer.num_tokens, model.vocab_size)
        return cls(model, tokenizer, thinking, ends, limit, tools)

    @property
    def format(self) -> ReasoningFormat | None:
        """The reasoning format; None: no request can think."""
        return self.thinking.format

    @property
    def ends_by_tools(self) -> bool:
        """Thinking ends otherwise where the answer may call tools."""
        return self.format is not None and self.format.tools_end != self.format.natural_end

    def core_format(self, tools: bool = False) -> _core.BudgetFormat | None:
        """The reasoning format as the scheduler needs it; None for a model without one. ``tools``:
        for requests whose answer may call tools."""
        if self.format is None:
            return None
        return make_core_format(self.format, self.tokenizer, self.vocab_limit, tools)


def _check_vocabulary(path: Path, model: ModelFacts, tokenizer: Tokenizer) -> None:
    """Raises ModelError if plain text may become ids that the model does not embed. Added tokens
    may be beyond: RequestCompiler refuses prompts that hold them."""
    if tokenizer.num_tokens <= model.vocab_size:
        return
    plain = tokenizer.num_plain_tokens()
    if plain > model.vocab_size:
        raise ModelError(
            f"{path}: the tokenizer has ids up to {plain - 1}; vocab_size of the model is "
            f"{model.vocab_size}"
        )


def _end_token_ids(path: Path, model: ModelFacts, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a turn: the model's and the tokenizer's own. Raises ModelError."""
    own = tokenizer.eos_token_id
    if own is None or own in model.eos_token_ids:
        return model.eos_token_ids
    if own >= model.vocab_size:
        raise ModelError(
            f"{path}: the tokenizer's eos_token has id {own}, outside of vocab_size "
            f"({model.vocab_size})"
        )
    return (*model.eos_token_ids, own)
