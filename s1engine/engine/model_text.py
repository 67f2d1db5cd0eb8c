"""What there is of a model besides its weights: facts, tokenizer, reasoning format.

Enough to turn requests into integers and integers into text, so it is all that a process without
the weights needs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s1engine.config import EngineConfig
from s1engine.models.model_config import ModelConfig
from s1engine.reasoning import ReasoningFormat, detect_format
from s1engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelText:
    """The text side of one model directory."""

    config: ModelConfig
    tokenizer: Tokenizer
    format: ReasoningFormat | None
    vocab_limit: int  # ids below it may be sampled; those of a prompt go up to the embedding's rows

    @classmethod
    def load(cls, config: EngineConfig, path: Path) -> "ModelText":
        """Raises ModelError or RequestError."""
        model = ModelConfig.from_dir(path)
        tokenizer = Tokenizer.from_dir(path, config.chat_template)
        reasoning = detect_format(tokenizer, model.eos_token_ids, config.reasoning_format)
        return cls(model, tokenizer, reasoning, min(tokenizer.num_tokens, model.vocab_size))

    def default_sampling(self) -> dict[str, Any]:
        """Sampling fields that the model directory sets; greedy if it sets ``do_sample`` false."""
        return dict(self.config.generation_defaults)
