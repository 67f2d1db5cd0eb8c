"""The recipe of one training run: a frozen dataclass, read from one YAML file.

Every field is checked here; the rest of the trainer trusts it. Unknown fields are refused. The
bundled recipes are in ``training/sft/configs``.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from s1engine.checks import check_float, check_int
from s1engine.config import BUNDLED_MODEL
from s1engine.errors import RequestError

CONFIGS = Path(__file__).parent / "configs"

_BOUNDS: dict[str, tuple[float, float]] = {
    "epochs": (1, 10_000), "batch_rows": (1, 2**20), "block_size": (2, 2**20),
    "learning_rate": (0.0, 10.0), "warmup_ratio": (0.0, 1.0), "weight_decay": (0.0, 10.0),
    "beta1": (0.0, 0.9999), "beta2": (0.0, 0.99999), "clip": (1e-9, 1e9),
    "loss_chunk": (1, 2**20), "seed": (0, 2**31 - 1), "save_every": (0, 2**31), "keep": (1, 1000),
    "threads": (0, 1024), "gpus": (1, 2**16), "expected_samples": (0, 10**9),
    "expected_tokens": (0, 10**13),
}  # fmt: skip
_CHOICES = {
    "too_long": ("truncate", "drop", "error"),
    "compute_dtype": ("bfloat16", "float32"),
    "offload": ("none", "activations", "state"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SftConfig:
    """One run. Defaults are s1's (s1-32B; arXiv 2501.19393 and its published training script)."""

    data: tuple[str, ...]
    """JSON lines files in the formats of s1K or s1K-1.1, or with a field ``text``."""
    out: str
    """Folder of checkpoints, logs, and the finished model."""
    model: str | None = None
    """Hugging Face directory or hub id to start from. None: random weights of ``architecture``."""
    architecture: Mapping[str, Any] | None = None
    """Fields of a Hugging Face config.json. Lets --dry-run work without the model's files."""
    tokenizer: str | None = None
    """Directory or hub id of the tokenizer. None: the model's. As for ``model``, ``s1-nano`` is
    the bundled one."""
    teacher: str | None = None
    """The teacher to learn from where rows hold several (s1K-1.1: gemini, deepseek)."""
    think_start: str = "<|im_start|>think"
    answer_start: str = "<|im_start|>answer"

    epochs: int = 5
    batch_rows: int = 16
    """Rows of an optimizer step, over all ranks and micro-batches."""
    block_size: int = 32768
    """Most tokens of a row."""
    packing: bool = True
    """Fill rows with several samples that do not see each other. False: one sample a row."""
    too_long: str = "truncate"
    """What happens to samples longer than ``block_size``; they are counted in any case."""
    learning_rate: float = 1e-5
    warmup_ratio: float = 0.05
    """Share of all steps, rounded up, over which the rate rises linearly."""
    weight_decay: float = 1e-4
    """On matrices only."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """Norm of the gradient over all parameters."""
    seed: int = 42

    compute_dtype: str = "bfloat16"
    """Of forward and backward; weights, summed gradients and optimizer are float32."""
    gradient_checkpointing: bool = True
    offload: str = "none"
    """``activations``: saved layer inputs are kept in host memory. ``state``: weights, gradients
    and optimizer live there as well, and the optimizer runs there (FSDP2's CPU offload)."""
    loss_chunk: int = 1024
    """Tokens whose logits exist at once."""
    save_every: int = 100
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Checkpoints kept."""
    threads: int = 0
    """Of torch on a CPU; 0: torch's choice."""

    gpus: int = 1
    """Ranks that --dry-run assumes; torchrun decides how many there are."""
    expected_samples: int = 0
    """Samples that --dry-run assumes if ``data`` does not exist."""
    expected_tokens: int = 0
    """Tokens of all samples together that --dry-run assumes if ``data`` does not exist."""

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            if isinstance(self.__dataclass_fields__[name].default, int):
                check_int(name, getattr(self, name), int(low), int(high))
            else:
                check_float(name, getattr(self, name), low, high)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise _error(name, f"must be one of {', '.join(allowed)}")
        for name in ("packing", "gradient_checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise _error(name, "must be true or false")
        if self.model is None and self.architecture is None:
            raise _error("model", "is missing; give it, or architecture for random weights")
        if self.model is None and self.tokenizer is None:
            raise _error("tokenizer", "is missing; it is required without a model")
        if not self.data:
            raise _error("data", "must name at least one file")

    @classmethod
    def read(cls, path: Path, **overrides: Any) -> "SftConfig":
        """The recipe of a YAML file or of a bundled name; ``overrides`` win over its fields.
        Raises RequestError that names the field."""
        bundled = CONFIGS / f"{path}.yaml"
        file = bundled if not path.exists() and bundled.exists() else path
        try:
            given = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            names = ", ".join(sorted(config.stem for config in CONFIGS.glob("*.yaml")))
            reason = f"{path}: {error.strerror}; bundled recipes: {names}"
            raise RequestError(reason, param="config") from error
        except yaml.YAMLError as error:
            raise RequestError(f"{file} is not YAML: {error}", param="config") from error
        if not isinstance(given, dict):
            raise RequestError(f"{file} must hold fields and values", param="config")
        return cls.from_dict({**given, **overrides})

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "SftConfig":
        """The recipe of plain values, as YAML gives them."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in given:
            if name not in fields:
                raise _error(str(name), "is no field of a recipe")
        for name in ("data", "out"):
            if given.get(name) is None:
                raise _error(name, "is missing")
        return cls(**{name: _parse_value(fields[name], value) for name, value in given.items()})

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_dict`` reads them back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["architecture"] = dict(self.architecture) if self.architecture else None
        return values | {"data": list(self.data)}


def _parse_value(field: Any, value: Any) -> Any:
    """A YAML value in its field's type: YAML reads 1e-5 as text."""
    name = field.name
    if name == "data":
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
            raise _error(name, "must be a list of file names")
        return tuple(os.path.expanduser(one) for one in value)
    if name == "architecture" and value is not None:
        if not isinstance(value, Mapping) or "model_type" not in value:
            raise _error(name, "must hold the fields of a config.json, model_type among them")
        return dict(value)
    if isinstance(field.default, float) and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise _error(name, f"must be a number; got {value!r}") from None
    is_text = field.default is None or isinstance(field.default, str) or name == "out"
    if is_text and not isinstance(value, str | None) and name != "architecture":
        raise _error(name, f"must be text; got {value!r}")
    if name in ("model", "tokenizer") and value == BUNDLED_MODEL.name:
        return str(BUNDLED_MODEL)
    return value


def _error(name: str, reason: str) -> RequestError:
    return RequestError(f"{name} {reason}", param=name)
