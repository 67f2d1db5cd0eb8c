"""Which implementation computes a model: our decoder, or a module of transformers."""

from pathlib import Path

from s1engine import gguf_file
from s1engine.errors import RequestError
from s1engine.models.config_reader import ConfigReader
from s1engine.models.families import native_architecture
from s1engine.models.model_config import ModelConfig
from s1engine.models.transformers_config import TransformersConfig


def read_facts(path: Path, model_impl: str) -> ModelConfig | TransformersConfig:
    """The facts of a model directory or a GGUF file.

    ``model_impl``: ``native``, ``transformers``, or ``auto``, which is native for every
    architecture of families.py and for GGUF files. Raises ModelError naming file and field for a
    model that is refused.
    """
    if path.suffix == gguf_file.SUFFIX:
        if model_impl == "transformers":
            raise RequestError(
                f"model_impl transformers: {path.name} is a GGUF file, which is read natively",
                param="model_impl",
            )
        return ModelConfig.from_dir(path)
    if model_impl == "auto":
        native = native_architecture(ConfigReader.read(path / "config.json")) is not None
    else:
        native = model_impl == "native"
    return ModelConfig.from_dir(path) if native else TransformersConfig.from_dir(path)
