"""Targets ``config``, ``safetensors``, ``tokenizer`` and ``gguf``: files of a model directory.

A file that is damaged or hostile ends in a ModelError that names it. Files are written to memory.
"""

import contextlib
import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from s1engine.config import BUNDLED_MODEL
from s1engine.errors import ModelError, RequestError
from s1engine.gguf_file import GgufFile
from s1engine.gguf_tokenizer import read_gguf_tokenizer
from s1engine.models.checkpoint import Checkpoint
from s1engine.models.gguf_checkpoint import GgufCheckpoint
from s1engine.models.model_config import ModelConfig
from s1engine.tokenizer import Tokenizer
from s1engine.tokenizer_json import read_tokenizer_json
from tests.fuzz.target import Target

SEPARATOR = b"\n\x00\n"  # between the files of one input


@functools.cache
def _folder() -> Path:
    """A folder in memory, which is removed with this process."""
    folder = tempfile.TemporaryDirectory(dir="/dev/shm", prefix="s1engine-fuzz-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


@contextlib.contextmanager
def _files(names: tuple[str, ...], data: bytes) -> Iterator[Path]:
    """A directory of files; an empty one does not exist."""
    path = _folder() / "model"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for name, content in zip(names, data.split(SEPARATOR, len(names) - 1), strict=False):
        if content:
            (path / name).write_bytes(content)
    yield path


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """Expects nothing, or a refusal of one line."""
    try:
        yield
    except ModelError as error:
        assert str(error).isprintable(), repr(error)


def run_config(data: bytes) -> None:
    with _files(("config.json", "generation_config.json"), data) as path, _refused():
        config = ModelConfig.from_dir(path)
        assert config.num_parameters > 0
        for layer in range(config.num_layers):
            config.layer_rope(layer)


def run_safetensors(data: bytes) -> None:
    names = ("model.safetensors", "model.safetensors.index.json", "other.safetensors")
    with _files(names, data) as path, _refused():
        checkpoint = Checkpoint(path)
        checkpoint.weights_digest()
        config = ModelConfig.from_dir(BUNDLED_MODEL)
        checkpoint.check(config.tensor_shapes(), lambda name: False)


def run_tokenizer(data: bytes) -> None:
    names = ("tokenizer_config.json", "config.json", "chat_template.jinja", "tokenizer.json")
    with _files(names, data) as path, _refused():
        if not (path / "tokenizer.json").exists():
            shutil.copy(BUNDLED_MODEL / "tokenizer.json", path)
        parts = read_tokenizer_json(path)
        if parts is None:
            return  # transformers reads it, and TokenizerFiles turns any error into a ModelError
        try:
            tokenizer = Tokenizer(*parts)
        except RequestError:
            return  # of the chat template
        for token_id in tokenizer.encode("Two  words, 1234: é")[:8]:
            tokenizer.token_bytes(token_id)


def run_gguf(data: bytes) -> None:
    path = _folder() / "model.gguf"
    path.write_bytes(data)
    with _refused():
        file = GgufFile(path)
        for name in file.tensors:
            file.read(name)
    with _refused():
        read_gguf_tokenizer(path)
    with _refused():
        ModelConfig.from_file(path)
    with _refused():
        GgufCheckpoint(path)


def _json_words(*files: str) -> list[bytes]:
    """Names of the fields of the bundled model's files."""
    words = [SEPARATOR, b"null", b"true", b"-1", b"1e400", b"[]", b"{}"]
    for file in files:
        words += [
            json.dumps(name).encode() + b":"
            for name in json.loads((BUNDLED_MODEL / file).read_text())
        ]
    return words


GGUF_WORDS = [
    *(b"GGUF", b"general.architecture", b"general.alignment", b"tokenizer.ggml.tokens"),
    *(b"tokenizer.ggml.merges", b"tokenizer.ggml.token_type", b"tokenizer.ggml.pre", b"gpt2"),
    *(b"llama.block_count", b"llama.context_length", b"llama.rope.freq_base", b"split.count"),
]
CONFIG_WORDS = [
    *(
        b'"rope_parameters":',
        b'"rope_scaling":',
        b'"rope_type":"yarn"',
        b'"factor":',
        b'"text_config":',
    ),
    *(b'"layer_types":', b'"sliding_window":', b'"sliding_attention"', b'"full_attention"'),
    *(b'"quantization_config":', b'"quant_method":"fp8"', b'"weight_block_size":[128,128]'),
    *(b'"architectures":["Qwen3ForCausalLM"]', b'"Gemma3ForCausalLM"', b'"LlamaForCausalLM"'),
]
TARGETS = {
    "config": Target(
        run_config, _json_words("config.json", "generation_config.json") + CONFIG_WORDS
    ),
    "safetensors": Target(
        run_safetensors,
        [SEPARATOR, b'"dtype":"F32"', b'"shape":[', b'"data_offsets":[', b"__metadata__"],
    ),
    "tokenizer": Target(
        run_tokenizer, _json_words("tokenizer.json", "tokenizer_config.json"), max_bytes=16384
    ),
    "gguf": Target(run_gguf, GGUF_WORDS),
}
