"""Hostile model directories, made from the bundled model by changing one file. The oracle: a
ModelError (or RequestError) of one line that names the file or field, and bounded memory. A hang is
a failure of its own."""

import json
import os
import resource
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from s1engine.config import BUNDLED_MODEL, EngineConfig
from s1engine.engine.model_text import ModelText
from s1engine.errors import ModelError, RequestError
from s1engine.models.loader import load_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.models.model_path import resolve_model
from s1engine.ops.torch_ops import TorchOps
from s1engine.runner.load_model import load_model
from s1engine.runner.resolved_config import resolve_config

MAX_GROWTH_KIB = 2**18
SECRET = "a-key-that-must-not-leak"
TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS = "model.safetensors"
TEMPLATE = "chat_template.jinja"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled model."""
    shutil.copytree(BUNDLED_MODEL, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KIB


def load(folder: Path) -> ModelText:
    """All that is read of a directory, as an engine does."""
    path = resolve_model(str(folder))
    config = EngineConfig(model=str(path), device="cpu", dtype="float32")
    text = ModelText.load(config, path)
    assert isinstance(text.config, ModelConfig)
    load_model(
        resolve_config(config),
        text.config,
        path,
        TorchOps(),
        dtype=torch.float32,
        cache_dtype=torch.float32,
        collective=None,
        progress=False,
    )
    return text


def refused(folder: Path, *names: str) -> None:
    """The directory is refused by one line with one of ``names``."""
    with pytest.raises((ModelError, RequestError)) as raised:
        load(folder)
    text = str(raised.value)
    assert "\n" not in text and len(text) < 1500
    assert any(name in text for name in names), text
    assert SECRET not in text


def test_the_bundled_model_loads(folder: Path) -> None:
    load(folder)


# --- kinds of files ---


def fifo(file: Path) -> None:
    os.mkfifo(file)


def unix_socket(file: Path) -> None:
    here = os.getcwd()
    os.chdir(file.parent)  # a long path does not fit
    try:
        socket.socket(socket.AF_UNIX).bind(file.name)
    finally:
        os.chdir(here)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda file: file.symlink_to(target)


def holding(data: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(data) and None


def sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(2**33)


KINDS: dict[str, Callable[[Path], Any]] = {
    "fifo": fifo,
    "socket": unix_socket,
    "folder": Path.mkdir,
    "device": link_to("/dev/zero"),
    "environment": link_to("/proc/self/environ"),
    "link to nothing": link_to("nowhere"),
    "link to itself": lambda file: file.symlink_to(file.name),
    "sparse": sparse,
    "empty": Path.touch,
    "binary": holding(bytes(range(256)) * 16),
    "utf-16": holding('{"a": 1}'.encode("utf-16")),
    "truncated": holding(b'{"a": [1, 2'),
    "deep": holding(b"[" * 10**5),
    "list": holding(b"[]"),
    "many": holding(b'{"a": [' + b"[]," * 2**20 + b"1]}"),
    "twice": holding(b'{"a": 1, "a": 2}'),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*TEXTS, TEMPLATE, WEIGHTS])
def test_files_of_any_kind_are_refused(
    folder: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTILE", SECRET)
    (folder / name).unlink(missing_ok=True)
    KINDS[kind](folder / name)
    is_text = name == TEMPLATE and kind in ("empty", "truncated", "deep", "list", "many", "twice")
    if is_text and kind != "many":
        load(folder)
    else:
        refused(folder, name, "the tokenizer", "chat_template")


@pytest.mark.parametrize("name", [*TEXTS, TEMPLATE])
def test_texts_outside_of_the_directory_are_refused(folder: Path, name: str) -> None:
    other = folder.parent / "other"
    (folder / name).touch()
    (folder / name).rename(other)
    (folder / name).symlink_to("../other")
    refused(folder, f"{name}: is a link to {other}")


def test_a_link_of_the_template_folder_is_refused(folder: Path) -> None:
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "x.jinja").write_text("x")
    (folder / "additional_chat_templates").symlink_to("../other")
    refused(folder, "x.jinja")


def test_links_of_the_hubs_cache_and_of_weights_are_followed(folder: Path) -> None:
    revision = folder.parent / "models--a--b" / "snapshots" / "0123"
    blobs = revision.parent.parent / "blobs"
    revision.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (revision / file.name).symlink_to(f"../../blobs/{file.name}")
    load(revision)
    (revision / WEIGHTS).unlink()
    (blobs / WEIGHTS).rename(folder.parent / "weights")
    (revision / WEIGHTS).symlink_to(folder.parent / "weights")
    load(revision)
    (folder.parent / "models--a--b" / "refs").write_text("{}")
    (revision / "config.json").unlink()
    (revision / "config.json").symlink_to("../../refs")
    refused(revision, "config.json: is a link")


# --- fields ---


def change(file: Path, **fields: Any) -> None:
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, **fields}))


BAD = [None, True, -1, 0, 2**31, 10**400, 0.5, float("nan"), float("inf"), "x", [], [1], {}]
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "head_dim")
MAY_BE_NULL = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta")


@pytest.mark.parametrize("field", [*SIZES, "rms_norm_eps", "rope_theta"])
def test_sizes_are_checked(folder: Path, field: str) -> None:
    for value in BAD:
        change(folder / "config.json", **{field: value})
        if field in ("rms_norm_eps", "rope_theta") and value in (0.5, True, 2**31):
            continue
        if value is None and field in MAY_BE_NULL:
            continue
        refused(folder, field, "tensor", "weights", "divide")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 1000},
        {"num_hidden_layers": 10**6},
        {"vocab_size": 2**31 - 1},
        {"hidden_size": 2**30},
        {"intermediate_size": 2**31 - 1},
        {"max_position_embeddings": 2**24},
        {"architectures": []},
        {"architectures": ["x" * 10**6]},
        {"eos_token_id": [2**40]},
        {"eos_token_id": float("nan")},
        {"layer_types": ["x" * 10**6]},
        {"rope_scaling": {"rope_type": "linear", "factor": float("nan")}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 1e29}},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [0], "long_factor": [1]}},
        {"rope_scaling": {"rope_type": ["x"]}},
        {"rope_scaling": "x" * 10**6},
        {"quantization_config": {"quant_method": "x" * 10**6}},
        {"quantization_config": {"quant_method": ["fp8"]}},
        {"sliding_window": -1, "use_sliding_window": True},
        {"reasoning_format": ["s1"]},
    ],
    ids=lambda fields: str(fields)[:50],
)
def test_values_of_config_json_are_checked(folder: Path, fields: dict[str, Any]) -> None:
    change(folder / "config.json", **fields)
    refused(folder, *fields, "tensor", "weights", "layer_types")


@pytest.mark.parametrize(
    "field", ["temperature", "top_k", "top_p", "eos_token_id", "stop_strings", "max_new_tokens"]
)
def test_values_of_generation_config_are_checked(folder: Path, field: str) -> None:
    for value in ([-1], float("nan"), 10**400, {"a": 1}, [["x"]]):
        change(folder / "generation_config.json", **{field: value})
        refused(folder, field)


@pytest.mark.parametrize("fields", [{}, {"text_config": None}])
def test_code_of_the_hub_is_never_fetched(folder: Path, fields: dict[str, Any]) -> None:
    hostile = {"attn_implementation": "kernels-community/evil"}
    change(folder / "config.json", **({"text_config": hostile} if fields else hostile))
    change(folder / "config.json", architectures=["GPT2LMHeadModel"], model_type="gpt2")
    refused(folder, "attn_implementation ('kernels-community/evil') names code")


# --- tokenizers ---


def test_a_missing_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, "tokenizer.json: no such file")


def with_vocabulary(extra: dict[str, int]) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["model"]["vocab"].update(extra)


def with_part(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update({name: value})


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
TOKENIZERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": dict.clear,
    "no tokens": lambda values: values["model"].update(vocab={}, merges=[]),
    "huge id": with_vocabulary({"zz": 2**32 - 1}),
    "beyond the embedding": with_vocabulary({"zz": 10**5}),
    "no model": with_part("model", None),
    "unknown word": with_part("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "u"}),
    "no pieces": with_part("model", {"type": "Unigram", "vocab": [], "unk_id": None}),
    "bad merges": lambda values: values["model"].update(merges=[["zz", "yy"]]),
    "decoder grows": with_part("decoder", {"type": "Sequence", "decoders": [REPLACE] * 9}),
    "special token is missing": with_part(
        "post_processor",
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "z", "type_id": 0}}],
         "pair": [], "special_tokens": {}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_that_cannot_work_are_refused(folder: Path, kind: str) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    TOKENIZERS[kind](values)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    refused(folder, "tokenizer")


def test_a_prompt_with_an_added_token_beyond_the_embedding_is_refused(folder: Path) -> None:
    from s1engine.engine.request_compiler import RequestCompiler
    from s1engine.sampling_params import SamplingParams

    values = json.loads((folder / "tokenizer.json").read_text())
    contents = [*(f"<|{i}|>" for i in range(100)), "<|beyond|>"]  # the library numbers them itself
    first = len(values["model"]["vocab"])
    values["added_tokens"] += [
        {**values["added_tokens"][0], "id": first + i, "content": content}
        for i, content in enumerate(contents)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    text = ModelText.load(EngineConfig(model=str(folder)), folder)
    (token,) = text.tokenizer.encode("<|beyond|>")
    assert token >= text.config.vocab_size
    compiler = RequestCompiler(text, 256, EngineConfig(model=str(folder)))
    for prompt in ("a <|beyond|>", [{"role": "user", "content": "<|beyond|>"}]):
        with pytest.raises(RequestError, match=str(token)):
            compiler.compile(prompt, SamplingParams())
    assert len(compiler.compile("a", SamplingParams()).prompt)


# --- weights ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers_are_refused(
    folder: Path, value: float, dtype: torch.dtype
) -> None:
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    name = names[len(names) // 2]
    tensors[name] = tensors[name].to(dtype)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / WEIGHTS)
    config = ModelConfig.from_dir(folder)
    for loaded in (torch.float32, torch.bfloat16, torch.float16):
        with pytest.raises(ModelError, match=f"tensor '{name}' holds NaN or infinity"):
            load_decoder(folder, config, loaded, "cpu", TorchOps())


def header(size: int, text: bytes, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", size) + text + rest


ENTRY = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[%d,%d]}}'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        header(2**63, b"{}"),
        header(2**64 - 1, b"{}"),
        header(10**8 + 1, b"{}"),
        header(2, b"[]"),
        header(9, b'{"a":{}}}'),
        *(
            header(len(text), text, bytes(64))
            for text in (
                ENTRY % (2**62, 0, 8),
                ENTRY % (16, 8, 0),
                ENTRY % (16, 0, 2**63),
                ENTRY % (16, 0, 64),
            )
        ),
        header(10**6, b" " * 10**6),
    ],
    ids=range(12),
)
def test_damaged_headers_are_refused(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS).write_bytes(data)
    refused(folder, WEIGHTS)


@pytest.mark.parametrize(
    "file", ["../../etc/passwd", "/etc/passwd", "../x.safetensors", "y.safetensors", "", 5, None]
)
def test_an_index_that_names_other_files_is_refused(folder: Path, file: Any) -> None:
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    index = {"weight_map": dict.fromkeys(names, file)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    refused(folder, "index.json", "y.safetensors: no such file")


# --- templates ---


@pytest.mark.parametrize("name", [TEMPLATE, "tokenizer_config.json"])
@pytest.mark.parametrize("source", ["{% if %}", "{{ " + "9" * 5000 + " }}", "{% include 'x' %}"])
def test_templates_that_do_not_compile_are_refused(folder: Path, name: str, source: str) -> None:
    if name == TEMPLATE:
        (folder / name).write_text(source)
    else:
        change(folder / name, chat_template=source)
    refused(folder, "chat_template")
