"""Matrices in fp8: quantized at load, or read from fp8 checkpoints, which are compared with the
same model dequantized to float32."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from s1engine.errors import ModelError
from s1engine.models.decoder import Decoder
from s1engine.models.loader import load_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.models.shard import Shard
from s1engine.models.weight_bytes import weight_bytes
from s1engine.ops import Ops
from s1engine.ops.cpu_ops import CpuOps
from s1engine.ops.quantization import QuantizedMatrix, quantize
from s1engine.ops.torch_ops import TorchOps
from tests.models.harness import run_in_chunks
from tests.tiny_models import make_model

FP8 = torch.float8_e4m3fn
BLOCK = (24, 32)  # divides neither the rows of k and v nor the columns of all
PROJECTION = "model.layers.0.self_attn.k_proj.weight"


def compressed(strategy: str, **further: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"dynamic": True}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        **further,
    }


LAYOUTS: dict[str, dict[str, Any]] = {
    "channel": compressed("channel"),
    "tensor": compressed("tensor"),
    "plain": {"quant_method": "fp8", "activation_scheme": "static"},
    "block": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)},
}


def blocks_of(scales: Tensor, shape: torch.Size) -> Tensor:
    """The scale of its block for each element."""
    rows = [row // BLOCK[0] for row in range(shape[0])]
    columns = [column // BLOCK[1] for column in range(shape[1])]
    return scales[rows][:, columns]


def in_layout(layout: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``weight`` in e4m3, its scales, and their product."""
    rows, columns = weight.shape
    if layout == "channel":
        made = quantize(weight, "fp8")
        return made.values, made.scales, made.dequantize()
    if layout == "block":
        scales = torch.rand(-(-rows // BLOCK[0]), -(-columns // BLOCK[1])) / 100 + 0.001
        wide = blocks_of(scales, weight.shape)
    else:
        scales = (weight.abs().max() / 448).reshape(1 if layout == "tensor" else ())
        wide = scales
    values = (weight / wide).clamp(-448, 448).to(FP8)
    return values, scales, values.float() * wide


def make_pair(
    tmp_path: Path, layout: str, family: str = "qwen2", **sizes: Any
) -> tuple[Path, Path]:
    """A checkpoint in fp8, and the same model in float32."""
    sizes = {"intermediate_size": 64, **sizes}
    twin = make_model(tmp_path / "twin", family, tie_word_embeddings=False, **sizes)
    path = tmp_path / "fp8"
    shutil.copytree(twin, path)
    tensors, plain = load_file(twin / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        plain[name] = weight
        if name.endswith("_proj.weight"):
            suffix = "weight_scale_inv" if layout == "block" else "weight_scale"
            values, scales, plain[name] = in_layout(layout, weight)
            tensors |= {name: values, name.replace("weight", suffix): scales}
            if layout == "plain":
                tensors[name.replace("weight", "input_scale")] = torch.tensor(0.5)
    save_file(tensors, path / "model.safetensors")
    save_file(plain, twin / "model.safetensors")
    set_quantization(path, LAYOUTS[layout])
    return path, twin


def set_quantization(path: Path, section: dict[str, Any] | None) -> None:
    fields = json.loads((path / "config.json").read_text())
    fields["quantization_config"] = section
    (path / "config.json").write_text(json.dumps(fields))


def load(
    path: Path,
    quantization: str | None = None,
    ops: Ops | None = None,
    dtype: torch.dtype = torch.float32,
    shard: Shard | None = None,
) -> Decoder:
    config = ModelConfig.from_dir(path)
    ops = ops or TorchOps()
    collective: Any = None if shard is None else SimpleNamespace(shard=shard)
    return load_decoder(
        path, config, dtype, "cpu", ops, quantization=quantization, collective=collective
    )


def logits(decoder: Decoder) -> Tensor:
    prompt = [5, 17, 60, 3, 44, 9]
    return run_in_chunks(decoder, [prompt], [4])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["channel", "tensor", "plain"])
def test_scales_of_rows_are_kept(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    """The matrix in memory equals the stored one bit for bit."""
    path, twin = make_pair(tmp_path, layout)
    decoder = load(path, dtype=dtype)
    stored = load_file(path / "model.safetensors")
    down = decoder.weights.layers[1].down
    assert isinstance(down, QuantizedMatrix) and down.values.dtype == FP8
    assert torch.equal(
        down.values.view(torch.uint8),
        stored["model.layers.1.mlp.down_proj.weight"].view(torch.uint8),
    )
    assert torch.equal(logits(decoder), logits(load(twin, dtype=dtype)))


def test_scales_of_blocks_become_scales_of_rows(tmp_path: Path) -> None:
    path, twin = make_pair(tmp_path, "block")
    assert torch.equal(logits(load(path)), logits(load(twin, "fp8")))
    assert isinstance(load(path).weights.layers[0].qkv, QuantizedMatrix)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [None, 1])
def test_fused_projections(tmp_path: Path, layout: str, rank: int | None) -> None:
    """Scales go with their rows, also where the dimensions of heads change their order."""
    rope = {"rope_type": "default", "partial_rotary_factor": 0.5}
    path, twin = make_pair(tmp_path, layout, "phi3", rope_parameters=rope)
    shard = None if rank is None else Shard(rank, 2)
    mine = load(path, shard=shard).weights.layers[1]
    wanted = load(twin, "fp8" if layout == "block" else None, shard=shard).weights.layers[1]
    for name in ("qkv", "o", "gate_up", "down"):
        found, expected = getattr(mine, name), getattr(wanted, name)
        assert isinstance(found, QuantizedMatrix)
        expected = expected.dequantize() if layout == "block" else expected
        assert torch.equal(found.dequantize(), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_formats_are_quantized_from_dequantized_fp8(tmp_path: Path, layout: str) -> None:
    path, twin = make_pair(tmp_path, layout)
    found = logits(load(path, "int8", CpuOps()))
    assert torch.equal(found, logits(load(twin, "int8", CpuOps())))


def test_matrices_that_were_left_in_16_bits(tmp_path: Path) -> None:
    path, twin = make_pair(tmp_path, "channel")
    tensors, plain = (load_file(at / "model.safetensors") for at in (path, twin))
    tensors[PROJECTION] = plain[PROJECTION]
    del tensors[PROJECTION + "_scale"]
    save_file(tensors, path / "model.safetensors")
    torch.testing.assert_close(logits(load(path)), logits(load(twin)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_read_their_parts(tmp_path: Path, layout: str, rank: int) -> None:
    path, twin = make_pair(tmp_path, layout)
    shard = Shard(rank, 2)
    mine = load(path, shard=shard).weights.layers[0]
    wanted = load(twin, "fp8" if layout == "block" else None, shard=shard).weights.layers[0]
    for name in ("qkv", "o", "gate_up", "down"):
        found, expected = getattr(mine, name), getattr(wanted, name)
        if layout == "block":
            expected = expected.dequantize()
        assert torch.equal(found.dequantize(), expected)


def test_at_load_all_but_embeddings_and_head_become_fp8(tmp_path: Path) -> None:
    path = make_model(tmp_path, "qwen3", tie_word_embeddings=False, dtype=torch.bfloat16)
    plain, packed = load(path).weights, load(path, "fp8").weights
    assert torch.equal(packed.lm_head, plain.lm_head)
    assert torch.equal(packed.embed, plain.embed)
    taken = sum(t.nbytes for t in (packed.lm_head, packed.embed, packed.norm))
    for layer, whole in zip(packed.layers, plain.layers, strict=True):
        for name in layer.__slots__:
            found = getattr(layer, name)
            if name in ("qkv", "o", "gate_up", "down"):
                made = quantize(getattr(whole, name), "fp8")
                assert torch.equal(found.dequantize(), made.dequantize())
                taken += found.values.nbytes + found.scales.nbytes
            else:
                taken += 0 if found is None else found.nbytes
    facts = ModelConfig.from_dir(path)
    assert weight_bytes(facts, torch.float32, "fp8").total == pytest.approx(taken, abs=100)


def test_the_engine_keeps_the_format_of_the_checkpoint(tmp_path: Path) -> None:
    path, twin = make_pair(tmp_path, "channel")
    packed, plain = ModelConfig.from_dir(path), ModelConfig.from_dir(twin)
    assert packed.quantization(None) == "fp8" and packed.quantization("int8") == "int8"
    assert plain.quantization(None) is None and plain.quantization("fp8") == "fp8"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"quant_method": "gptq"}, ["quant_method", "gptq", "fp8, compressed-tensors"]),
        ({"quant_method": "fp8", "fmt": "e5m2"}, ["fmt", "e5m2"]),
        ({"quant_method": "fp8", "weight_block_size": [128]}, ["weight_block_size"]),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, ["weight_block_size"]),
        (compressed("group"), ["weights.strategy", "group", "channel, tensor"]),
        (compressed("channel", format="pack-quantized"), ["format", "float-quantized"]),
        (compressed("channel", kv_cache_scheme={"num_bits": 8}), ["kv_cache_scheme"]),
        (compressed("channel", transform_config={"a": {}}), ["transform_config"]),
        (compressed("channel", config_groups={}), ["config_groups", "0 groups"]),
        ([1], ["quantization_config", "object"]),
    ],
)
def test_unsupported_layouts_are_refused(tmp_path: Path, section: Any, words: list[str]) -> None:
    path = make_model(tmp_path, "qwen2")
    set_quantization(path, section)
    with pytest.raises(ModelError) as refusal:
        ModelConfig.from_dir(path)
    for word in ("config.json", *words):
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({PROJECTION + "_scale": None}, ["k_proj.weight_scale", "missing"]),
        ({PROJECTION + "_scale": torch.ones(15, 1)}, ["[15, 1]", "[16, 1] or [16]"]),
        ({PROJECTION + "_scale": torch.ones(16, 1).to(FP8)}, ["weight_scale", "type F8_E4M3"]),
        ({PROJECTION: torch.zeros(16, 31).to(FP8)}, ["k_proj.weight", "shape"]),
        ({PROJECTION: torch.zeros(16, 32)}, ["k_proj.weight_scale", "not part"]),
        ({"lm_head.weight": torch.zeros(96, 32).to(FP8)}, ["lm_head.weight", "type F8_E4M3"]),
        ({PROJECTION + "_zero_point": torch.ones(1)}, ["zero_point", "not part"]),
    ],
)
def test_tensors_of_a_wrong_shape_or_type_are_refused(
    tmp_path: Path, change: dict[str, Tensor | None], words: list[str]
) -> None:
    path, _ = make_pair(tmp_path, "channel")
    tensors = {**load_file(path / "model.safetensors"), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path / "model.safetensors")
    with pytest.raises(ModelError) as refusal:
        load(path)
    for word in words:
        assert word in str(refusal.value)


def test_fp8_that_config_json_does_not_declare_is_refused(tmp_path: Path) -> None:
    path, _ = make_pair(tmp_path, "channel")
    set_quantization(path, None)
    with pytest.raises(ModelError, match="type F8_E4M3"):
        load(path)
