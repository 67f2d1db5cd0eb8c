"""GGUF files: the same logits as transformers' reading of them; refusals name file and field."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from s1engine.errors import ModelError
from s1engine.gguf_file import TYPES, GgufFile
from s1engine.models.checkpoint import open_weights
from s1engine.models.gguf_checkpoint import GgufCheckpoint, _gguf_name, _hf_name
from s1engine.models.model_config import ModelConfig
from s1engine.models.model_path import resolve_model
from s1engine.ops.quantization import quantize
from s1engine.tokenizer import Tokenizer
from tests.gguf_files import (
    ARCHITECTURES,
    KINDS,
    NUM_TOKENS,
    random_blocks,
    write,
    write_gguf,
)
from tests.models.harness import load, oracle, oracle_logits, run_in_chunks
from tests.tiny_models import make_model
from tests.tiny_tokenizer import TEMPLATE, make_backend

PROMPT = [5, 90, 17, 3, 64, 22, 200, 41, 8, 300, 33, 7]
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


def make_gguf(tmp_path: Path, family: str, kind: str = "F32", **overrides: Any) -> Path:
    model = make_model(tmp_path, family, vocab_size=NUM_TOKENS, **overrides)
    return write_gguf(tmp_path / f"{family}-{kind}.gguf", model, kind)


def gguf_oracle(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )


def assert_same_model(file: Path, reference: Any) -> None:
    """fp32 logits within 1e-4, and the same greedy choice at every position."""
    (ours,) = run_in_chunks(load(file), [PROMPT], [5])
    theirs = oracle_logits(reference, PROMPT)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.argmax(1), theirs.argmax(1))


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_logits_equal_transformers_reading_of_the_file(
    tmp_path: Path, family: str, kind: str
) -> None:
    # transformers takes Qwen3's default of 128 for the head size and ignores the file's
    sizes: dict[str, Any] = {"head_dim": 128} if family == "qwen3" else {}
    file = make_gguf(tmp_path, family, kind, intermediate_size=64, **sizes)
    assert_same_model(file, gguf_oracle(file))


@pytest.mark.parametrize("kind", KINDS)
def test_k_quants_equal_transformers_reading_of_the_file(tmp_path: Path, kind: str) -> None:
    file = make_gguf(tmp_path, "llama", kind, **WIDE)
    assert_same_model(file, gguf_oracle(file))


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_file_equals_the_directory_that_it_was_made_of(
    tmp_path: Path, family: str, tied: bool
) -> None:
    file = make_gguf(tmp_path, family, tie_word_embeddings=tied)
    directory = tmp_path / f"{family}-0"
    assert_same_model(file, oracle(directory))
    stored, config = open_weights(file), ModelConfig.from_dir(file)
    twin = open_weights(directory)
    assert config.tie_word_embeddings == tied
    for name in config.tensor_shapes():
        assert torch.equal(stored.read(name), twin.read(name)), name


def test_one_number_of_kv_heads_per_layer_is_accepted_if_all_are_equal(tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama", vocab_size=NUM_TOKENS)
    fields = {"llama.attention.head_count_kv": [2, 2]}
    assert_same_model(write_gguf(tmp_path / "x.gguf", model, fields=fields), oracle(model))


def test_biases_of_a_llama_file_are_loaded(tmp_path: Path) -> None:
    file = make_gguf(tmp_path, "llama", attention_bias=True)
    assert_same_model(file, oracle(tmp_path / "llama-0"))


def test_names_are_those_of_the_library() -> None:
    for family, architecture in ARCHITECTURES.items():
        names = gguf.get_tensor_name_map(architecture, 2)
        qk_norm = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
        parts = ["input_layernorm.weight", "self_attn.q_proj.bias", "mlp.down_proj.weight"]
        layers = [f"model.layers.1.{leaf}" for leaf in parts + qk_norm * (family == "qwen3")]
        for name in ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", *layers]:
            stored = names.get_name(name, (".weight", ".bias"))
            assert stored == _gguf_name(name) and _hf_name(stored) == name


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in ("F32", "F16", "BF16")])
def test_every_quantized_type_is_read_as_the_library_reads_it(tmp_path: Path, kind: str) -> None:
    qtype = GGMLQuantizationType[kind]
    data = random_blocks((3, 512), qtype)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", data, raw_dtype=qtype)
    write(writer)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(quants.dequantize(data, qtype))
    torch.testing.assert_close(
        GgufFile(tmp_path / "x.gguf").read("x"), expected, rtol=0, atol=0, equal_nan=True
    )


def test_q4_0_keeps_its_integers_in_int4() -> None:
    """Only the scales are rounded, from float16 to bfloat16."""
    matrix = np.random.default_rng(0).normal(size=(16, 256)).astype(np.float32)
    blocks = quants.quantize(matrix, GGMLQuantizationType.Q4_0)
    stored = torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType.Q4_0))
    packed = quantize(stored, "int4")
    nibbles = torch.from_numpy(blocks.reshape(16, 8, 18)[..., 2:])
    integers = torch.cat((nibbles & 15, nibbles >> 4), dim=2).flatten(1).to(torch.int8) - 8
    assert torch.equal(packed.values, integers)


def rope_factors(head_dim: int, theta: float, factor: float) -> np.ndarray[Any, Any]:
    """What llama's converter writes for Llama 3's scaling."""
    factors = []
    for pair in range(head_dim // 2):
        length = 2 * np.pi * theta ** (2 * pair / head_dim)
        if length < 8192 / 4:
            factors.append(1.0)
        elif length > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / length - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_the_factors_of_llama_3_scale_the_rotation(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {**scaling, "rope_theta": 500000.0}
    model = make_model(tmp_path, "llama", vocab_size=NUM_TOKENS, head_dim=32, rope_parameters=rope)
    file = tmp_path / "scaled.gguf"
    write_with_factors(file, model, rope_factors(32, 500000.0, 8.0))
    assert ModelConfig.from_dir(file).rope.scaling == scaling
    assert_same_model(file, oracle(model))
    write_with_factors(file, model, np.full(16, 2.0, np.float32))
    with pytest.raises(ModelError, match=r"scaled.gguf: tensor 'rope_freqs.weight'"):
        ModelConfig.from_dir(file)


def write_with_factors(file: Path, model: Path, factors: np.ndarray[Any, Any]) -> None:
    write_gguf(file, model, tensors={"rope_freqs.weight": factors},
               fields={"llama.attention.key_length": 32})  # fmt: skip


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaling_in_the_metadata_equals_the_directory(tmp_path: Path, kind: str) -> None:
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    fields = {"qwen2.rope.scaling.type": kind, "qwen2.rope.scaling.factor": 4.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 64
        fields["qwen2.rope.scaling.original_context_length"] = 64
    model = make_model(tmp_path, "qwen2", vocab_size=NUM_TOKENS, rope_parameters=rope)
    file = write_gguf(tmp_path / "scaled.gguf", model, fields=fields)
    assert_same_model(file, oracle(model))


def test_the_tokenizer_equals_transformers(tmp_path: Path) -> None:
    file = make_gguf(tmp_path, "llama")
    ours, theirs = Tokenizer.from_dir(file), AutoTokenizer.from_pretrained(
        tmp_path, gguf_file=file.name
    )  # fmt: skip
    text = "<|im_start|>user\nWait, 12 é 你好\n<|im_end|>"
    assert ours.encode(text) == theirs.encode(text) == make_backend().encode(text).ids
    assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
    chat = [{"role": "user", "content": "Wait"}]
    assert ours.render_chat(chat) == theirs.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert theirs.chat_template == TEMPLATE


def test_other_files_of_the_folder_are_not_read(tmp_path: Path) -> None:
    file = make_gguf(tmp_path, "llama")
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (tmp_path / name).write_text("{broken")
    assert Tokenizer.from_dir(file).num_tokens == NUM_TOKENS
    assert ModelConfig.from_dir(file).eos_token_ids == (NUM_TOKENS - 1,)


def test_digits_are_pieces_of_their_own_where_the_file_says_so(tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama", vocab_size=NUM_TOKENS)
    fields = {"tokenizer.ggml.pre": "smollm"}
    tokenizer = Tokenizer.from_dir(write_gguf(tmp_path / "x.gguf", model, fields=fields))
    pieces = tokenizer._backend.pre_tokenizer.pre_tokenize_str("a 123")
    assert [piece for piece, _ in pieces] == ["a", "Ġ", "1", "2", "3"]


@pytest.mark.parametrize("kind, dtype", [
    ("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16),
    ("Q8_0", torch.bfloat16), ("Q4_1", torch.bfloat16),
])  # fmt: skip
def test_the_type_is_the_files_or_bfloat16(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    file = make_gguf(tmp_path, "llama", kind, intermediate_size=64)
    assert ModelConfig.from_dir(file).torch_dtype == dtype


def test_ends_and_sampling_come_from_the_metadata(tmp_path: Path) -> None:
    model = make_model(tmp_path, "qwen3", vocab_size=NUM_TOKENS)
    fields = {
        "tokenizer.ggml.eot_token_id": 7,
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": 1.5,
    }
    config = ModelConfig.from_dir(write_gguf(tmp_path / "x.gguf", model, fields=fields))
    assert config.eos_token_ids == (NUM_TOKENS - 1, 7)
    assert config.generation_defaults == {
        "temperature": 0.5, "top_k": 20, "repetition_penalty": 1.5
    }  # fmt: skip


def test_digests_tell_files_apart(tmp_path: Path) -> None:
    files = [make_gguf(tmp_path / name, "llama", seed=seed) for name, seed in
             (("a", 0), ("b", 0), ("c", 1))]  # fmt: skip
    first, same, other = (open_weights(file).weights_digest() for file in files)
    assert first == same != other


# --- refusals


def refusal(file: Path) -> str:
    with pytest.raises(ModelError) as error:
        read_all(file)
    message = str(error.value)
    assert str(file) in message and "\n" not in message
    return message


def read_all(file: Path) -> None:
    """Config, tensors and tokenizer."""
    config = ModelConfig.from_dir(file)
    weights = open_weights(file)
    weights.check(config.tensor_shapes(), lambda name: False)
    for name in config.tensor_shapes():
        weights.read(name)
    Tokenizer.from_dir(file)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes]:
    folder = tmp_path_factory.mktemp("gguf")
    sizes = {"num_hidden_layers": 1, "intermediate_size": 32}
    model = make_model(folder, "llama", vocab_size=NUM_TOKENS, tie_word_embeddings=True, **sizes)
    yield write_gguf(folder / "x.gguf", model, "Q8_0").read_bytes()


@pytest.mark.parametrize("fields, words", [
    ({"llama.expert_count": 8}, "llama.expert_count 8"),
    ({"llama.logit_scale": 2.0}, "llama.logit_scale is not known"),
    ({"llama.attention.sliding_window": 16}, "llama.attention.sliding_window"),
    ({"llama.attention.value_length": 4}, "llama.attention.value_length 4"),
    ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count 4"),
    ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type 'longrope'"),
    ({"llama.attention.head_count_kv": [1, 2]}, "llama.attention.head_count_kv differs"),
    ({"llama.context_length": None}, "llama.context_length is missing"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
    ({"llama.block_count": 3}, "blk.2.attn_norm.weight' is missing"),
    ({"llama.block_count": 1}, "blk.1."),
    ({"llama.feed_forward_length": 64}, "tensor 'blk.0.ffn_gate.weight' has shape"),
    ({"split.count": 2}, "split.count is 2"),
    ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
    ({"tokenizer.ggml.pre": "unheard-of"}, "tokenizer.ggml.pre 'unheard-of'"),
    ({"tokenizer.ggml.model": "rwkv"}, "rwkv"),
    ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id"),
    ({"tokenizer.chat_template": "{% for %}"}, "chat_template"),
])  # fmt: skip
def test_what_would_change_results_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    model = make_model(tmp_path, "llama", vocab_size=NUM_TOKENS)
    assert words in refusal(write_gguf(tmp_path / "x.gguf", model, fields=fields))


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "mamba2")
    write(writer)
    message = refusal(tmp_path / "x.gguf")
    assert "general.architecture 'mamba2' is not supported" in message and "qwen3" in message


def test_a_newer_version_names_itself(tmp_path: Path, whole: bytes) -> None:
    file = tmp_path / "new.gguf"
    file.write_bytes(whole[:4] + struct.pack("<I", 4) + whole[8:])
    assert "GGUF version 4" in refusal(file)


def test_an_unknown_tensor_type_names_itself(tmp_path: Path, whole: bytes) -> None:
    file = tmp_path / "type.gguf"
    at = whole.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
    file.write_bytes(whole[:at] + struct.pack("<I", 99) + whole[at + 4 :])
    assert "tensor 'blk.0.attn_q.weight' has type number 99" in refusal(file)


@pytest.mark.parametrize("at, name", [(8, "tensor_count"), (16, "kv_count"), (24, "the length of")])
@pytest.mark.parametrize("count", [2**60, 2**32, 2**64 - 1])
def test_counts_of_a_hostile_header_are_refused(
    tmp_path: Path, whole: bytes, at: int, name: str, count: int
) -> None:
    file = tmp_path / "hostile.gguf"
    file.write_bytes(whole[:at] + struct.pack("<Q", count) + whole[at + 8 :])
    assert name in refusal(file)


@pytest.mark.parametrize("text", [b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type"])
@pytest.mark.parametrize("count", [2**60, 2**23])
def test_lengths_of_hostile_arrays_are_refused(
    tmp_path: Path, whole: bytes, text: bytes, count: int
) -> None:
    file = tmp_path / "hostile.gguf"
    at = whole.index(text) + len(text) + 8
    file.write_bytes(whole[:at] + struct.pack("<Q", count) + whole[at + 8 :])
    assert text.decode() in refusal(file)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, share: float
) -> None:
    file = tmp_path_factory.getbasetemp() / "truncated.gguf"
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match=r"truncated.gguf: "):
        ModelConfig.from_dir(file)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_an_error_or_a_model(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject
) -> None:
    """Flipped bytes of the header: never a crash, never another exception."""
    damaged = bytearray(whole)
    header = whole.index(b"blk.0.attn_v.weight") + 64
    spots = st.integers(0, header - 1) | st.integers(0, len(whole) - 1)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(spots)] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "damaged.gguf"
    file.write_bytes(damaged)
    try:
        read_all(file)
    except ModelError as error:
        assert "damaged.gguf" in str(error)


# --- names of models


def test_a_file_and_a_folder_with_one_file_are_models(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.touch()
    assert resolve_model(str(file)) == resolve_model(str(tmp_path)) == file
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelError, match=r"several .gguf files; name one of a.gguf, b.gguf"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name, file", [
    ("someone/some-GGUF/sub/Some.Q4_K_M.gguf", "sub/Some.Q4_K_M.gguf"),
    ("someone/some-GGUF:Q4_K_M", "Some-Q4_K_M.gguf"),
    ("someone/some-GGUF:q8_0", "some-q8_0.gguf"),
])  # fmt: skip
def test_a_file_of_the_hub_is_fetched_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str
) -> None:
    for other in (file, "Some-Q6_K.gguf"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).touch()

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        assert repository == "someone/some-GGUF"
        assert any(Path(file).match(pattern) for pattern in allow_patterns)
        assert not any(Path("Some-Q6_K.gguf").match(pattern) for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve_model(name) == tmp_path / file


def test_a_quantization_that_the_hub_lacks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelError, match=r"someone/some:Q2_K.*it matches none"):
        resolve_model("someone/some:Q2_K")


def test_the_checkpoint_of_a_file_is_not_fp8(tmp_path: Path) -> None:
    assert not GgufCheckpoint(make_gguf(tmp_path, "llama")).is_fp8("lm_head.weight")
