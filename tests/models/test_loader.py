"""Reading checkpoints: single files, shards, conversion, and every defect of one."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from s1engine.errors import ModelError
from s1engine.models.checkpoint import Checkpoint
from s1engine.models.decoder import Decoder
from s1engine.models.loader import load_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.models.model_path import resolve_model
from s1engine.ops.torch_ops import TorchOps
from tests.models.harness import load
from tests.tiny_models import FAMILIES, make_model

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
QUERY = "model.layers.1.self_attn.q_proj.weight"


def tensors_of(decoder: Decoder) -> list[Tensor]:
    weights = decoder.weights
    tensors = [weights.embed, weights.norm, weights.lm_head]
    for layer in weights.layers:
        tensors += [
            value for name in layer.__slots__ if (value := getattr(layer, name)) is not None
        ]
    return tensors


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Saves the tensors of ``path`` again after ``change``."""
    tensors = load_file(path / SINGLE)
    change(tensors)
    save_file(tensors, path / SINGLE)


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(ModelError) as refusal:
        load(path)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_shards_hold_the_same_model(tmp_path: Path, family: str, tied: bool) -> None:
    whole = load(make_model(tmp_path / "whole", family, tie_word_embeddings=tied))
    path = make_model(tmp_path / "shards", family, tie_word_embeddings=tied, max_shard_size="12KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    for first, second in zip(tensors_of(whole), tensors_of(load(path)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_loaded_once(tmp_path: Path, family: str) -> None:
    path = make_model(tmp_path, family)
    decoder = load(path)
    stored = load_file(path / SINGLE)
    assert sum(tensor.numel() for tensor in tensors_of(decoder)) == decoder.config.num_parameters
    layer = decoder.weights.layers[1]
    prefix = "model.layers.1.self_attn."
    qkv = [stored[f"{prefix}{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(layer.qkv, torch.cat(qkv))
    if decoder.config.qkv_bias:
        assert torch.equal(
            layer.qkv_bias, torch.cat([stored[f"{prefix}{n}_proj.bias"] for n in "qkv"])
        )


@pytest.mark.parametrize("family", ["mistral3", "gemma3_wrapper"])
@pytest.mark.parametrize("style", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_checkpoint(tmp_path: Path, family: str, style: str) -> None:
    """Both spellings of transformers. The parts that see are skipped, others are refused."""
    path = make_model(tmp_path, family)
    expected = tensors_of(load(path))

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            for prefix in ("language_model.model.", "model.language_model."):
                if name.startswith(prefix):
                    tensors[style + name.removeprefix(prefix)] = tensors.pop(name)
        for head in ("lm_head.weight", "language_model.lm_head.weight"):
            if head in tensors:
                wrapper = "language_model." if style.startswith("language") else ""
                tensors[f"{wrapper}lm_head.weight"] = tensors.pop(head)

    rewrite(path, rename)
    stored = load_file(path / SINGLE)
    assert any("vision_tower" in name for name in stored)
    for first, second in zip(tensors_of(load(path)), expected, strict=True):
        assert torch.equal(first, second)
    rewrite(path, lambda tensors: tensors.update({"model.audio_tower.weight": torch.ones(2)}))
    assert_refused(path, "model.audio_tower.weight")


def test_fused_projections_are_cut_into_their_parts(tmp_path: Path) -> None:
    path = make_model(tmp_path, "phi3", tie_word_embeddings=True)
    layer, stored = load(path).weights.layers[1], load_file(path / SINGLE)
    assert torch.equal(layer.qkv, stored["model.layers.1.self_attn.qkv_proj.weight"])
    assert torch.equal(layer.gate_up, stored["model.layers.1.mlp.gate_up_proj.weight"])
    fused = "model.layers.0.self_attn.qkv_proj.weight"
    rewrite(path, lambda tensors: tensors.update({fused: tensors[fused][1:].clone()}))
    assert_refused(path, fused, "shape")


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_types_are_converted(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    path = make_model(tmp_path, "qwen2", dtype=stored)
    assert ModelConfig.from_dir(path).torch_dtype == stored
    decoder = load(path, wanted)
    assert {tensor.dtype for tensor in tensors_of(decoder)} == {wanted}
    assert torch.equal(
        decoder.weights.embed, load_file(path / SINGLE)["model.embed_tokens.weight"].to(wanted)
    )
    assert (decoder.dtype, decoder.device.type) == (wanted, "cpu")


def test_weights_outlive_their_file(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    decoder = load(path)
    before = [tensor.clone() for tensor in tensors_of(decoder)]
    size = (path / SINGLE).stat().st_size
    (path / SINGLE).write_bytes(b"\0" * size)
    assert all(map(torch.equal, tensors_of(decoder), before))


def test_progress_is_a_bar_on_a_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_model(tmp_path, "llama")
    capfd.readouterr()
    config = ModelConfig.from_dir(path)
    load_decoder(path, config, torch.float32, "cpu", TorchOps(), progress=True)
    assert capfd.readouterr() == ("", "")  # a file
    terminal = SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("s1engine.progress.sys", terminal)
    load_decoder(path, config, torch.float32, "cpu", TorchOps(), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "loading llama-0: 100%" in err
    load_decoder(path, config, torch.float32, "cpu", TorchOps(), progress=False)
    assert capfd.readouterr() == ("", "")


def test_values_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama", dtype=torch.bfloat16)
    rewrite(path, lambda tensors: tensors[QUERY][0].fill_(1e6))
    load(path, torch.bfloat16)
    with pytest.raises(ModelError, match=f"{QUERY}.*float16"):
        load(path, torch.float16)


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    rewrite(path, lambda tensors: tensors.pop(QUERY))
    assert_refused(path, QUERY, "missing", str(path / SINGLE))


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    rewrite(path, lambda tensors: tensors.pop("lm_head.weight"))
    assert_refused(path, "lm_head.weight", "missing")


def test_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    rewrite(path, lambda tensors: tensors.update({QUERY: torch.zeros(32, 31)}))
    assert_refused(path, QUERY, "[32, 31]", "[32, 32]", str(path / SINGLE))


def test_a_wrong_type_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    rewrite(path, lambda tensors: tensors.update({QUERY: torch.zeros(32, 32, dtype=torch.int8)}))
    assert_refused(path, QUERY, "I8", str(path / SINGLE))


def test_an_unexpected_tensor_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(path, lambda tensors: tensors.update({name: torch.zeros(32)}))
    assert_refused(path, name, "not part of this model", str(path / SINGLE))


def test_known_harmless_tensors_are_ignored(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama", tie_word_embeddings=True)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(path, add)
    decoder = load(path)
    assert decoder.weights.lm_head is decoder.weights.embed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_head_unlike_the_embeddings_it_is_tied_to_is_refused(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    path = make_model(tmp_path, "llama", tie_word_embeddings=True)
    rewrite(
        path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(96, 32, dtype=dtype)})
    )
    assert_refused(path, "lm_head.weight", "differs")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = make_model(tmp_path, "llama")
    (path / SINGLE).write_bytes((path / SINGLE).read_bytes()[:keep])
    assert_refused(path, str(path / SINGLE), "not a whole safetensors file")


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama", max_shard_size="20KB")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    assert_refused(path, str(shard), "not a whole safetensors file")


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama", max_shard_size="20KB")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    assert_refused(path, str(shard), "no such file")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_vanishes_while_it_is_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    path = make_model(tmp_path, "llama", max_shard_size="20KB")
    shard = sorted(path.glob("*.safetensors"))[1]

    def vanish(*_: object) -> None:
        shard.unlink()
        if replaced:
            shard.write_bytes(b"something else")

    monkeypatch.setattr(Checkpoint, "check", vanish)
    assert_refused(path, str(shard), "can be read no more")


def edit_index(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def test_an_index_that_names_a_wrong_file_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama", max_shard_size="20KB")
    edit_index(path, lambda names: names.update({"lm_head.weight": names["model.norm.weight"]}))
    names = json.loads((path / INDEX).read_text())["weight_map"]
    assert_refused(path, "lm_head.weight", str(path / names["model.norm.weight"]), INDEX)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "", 3])
def test_an_index_that_leaves_the_directory_is_refused(tmp_path: Path, file: str) -> None:
    path = make_model(tmp_path, "llama", max_shard_size="20KB")
    edit_index(path, lambda names: names.update({QUERY: file}))
    assert_refused(path, QUERY, str(path / INDEX))


def test_an_empty_index_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama", max_shard_size="20KB")
    edit_index(path, lambda names: names.clear())
    assert_refused(path, str(path / INDEX), "weight_map")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama", max_shard_size="20KB")
    first, second = sorted(path.glob("*.safetensors"))[:2]
    twice = next(iter(load_file(first)))
    save_file({**load_file(second), twice: load_file(first)[twice]}, second)
    assert_refused(path, twice, str(first), str(second))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    path = make_model(tmp_path, "llama")
    (path / SINGLE).rename(path / name)
    assert_refused(path, str(path / name), "safetensors")


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    (path / SINGLE).unlink()
    assert_refused(path, str(path / SINGLE), "no such file")


def test_a_local_directory_needs_no_hub(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_hub_model_is_fetched_without_its_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve_model("simplescaling/s1.1-32B") == tmp_path
    assert asked["name"] == "simplescaling/s1.1-32B"
    assert not any(Path("consolidated.safetensors").match(p) for p in asked["patterns"])
    assert any(Path("model-00001-of-00014.safetensors").match(p) for p in asked["patterns"])


@pytest.mark.parametrize(
    "name", ["/no/such/dir", "./missing", "missing", "a/b/c", "../x/y", "~nobody/x"]
)
def test_what_is_neither_directory_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="no such file or directory"):
        resolve_model(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(ModelError, match=r"a Hugging Face directory or a \.gguf file"):
        resolve_model(str(tmp_path / "model.bin"))


def test_a_failing_hub_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, allow_patterns: list[str]) -> str:
        raise OSError("cannot reach the hub\nlong explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match=r"someone/something.*cannot reach the hub") as refusal:
        resolve_model("someone/something")
    assert "\n" not in str(refusal.value)
