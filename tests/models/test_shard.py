"""The ranks' parts of a model: together they are the whole, and compute the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from s1engine.config import BUNDLED_MODEL
from s1engine.errors import RequestError
from s1engine.models.checkpoint import Checkpoint
from s1engine.models.collective import SharedCollective
from s1engine.models.loader import load_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.models.shard import Shard, check_tensor_parallel, tensor_parallel_sizes
from s1engine.ops.torch_ops import TorchOps
from s1engine.plan.placement import MAX_RANKS, footprint, rank_counts
from tests.models.harness import Rows
from tests.models.rank_threads import on_ranks
from tests.tiny_models import make_model

NANO = ModelConfig.from_dir(BUNDLED_MODEL)

# vocabularies that are no multiple of the ranks, biases after the sum, tied heads, shared KV heads
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"vocab_size": 97}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "vocab_size": 95}),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "llama-bias": ("llama", {"attention_bias": True, "num_key_value_heads": 4}),
    "mistral": ("mistral", {"num_key_value_heads": 1}),
    "phi3": ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "seed-oss": ("seed_oss", {"attention_out_bias": True}),
    "ministral3": ("ministral3", {}),
    "gemma3": ("gemma3", {"tie_word_embeddings": True, "sliding_window": 3}),
}


@st.composite
def sharded_models(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A model, and a number of ranks that can share it."""
    size = draw(st.integers(1, 5))
    kv = draw(
        st.sampled_from([n for n in range(1, 2 * size + 1) if n % size == 0 or size % n == 0])
    )
    group = draw(st.sampled_from([n for n in range(1, 2 * size + 1) if kv * n % size == 0]))
    return replace(
        NANO,
        num_layers=1,
        num_heads=kv * group,
        num_kv_heads=kv,
        head_dim=2 * draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 7)),
        intermediate_size=size * draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(max(size, 5), 40)),
        tie_word_embeddings=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    ), size


@given(sharded_models())
def test_parts_are_the_whole(drawn: tuple[ModelConfig, int]) -> None:
    model, size = drawn
    shards = [Shard(rank, size) for rank in range(size)]
    for name, shape in model.tensor_shapes().items():
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        own = Shard(0, size).config(model).tensor_shapes()[name]
        parts = [shard.cut(name, whole, own) for shard in shards]
        assert all(part.shape[1:] == own[1:] and len(part) <= own[0] for part in parts)
        if name.endswith("norm.weight"):
            assert all(torch.equal(part, whole) for part in parts)
        else:
            assert torch.equal(joined(name, parts, model, size), whole), name


def joined(name: str, parts: list[Tensor], model: ModelConfig, size: int) -> Tensor:
    """The parts concatenated; replicated ones once."""
    if ".k_proj." in name or ".v_proj." in name:
        copies = max(size // model.num_kv_heads, 1)
        assert all(torch.equal(part, parts[i - i % copies]) for i, part in enumerate(parts))
        parts = parts[::copies]
    columns = name.endswith(("o_proj.weight", "down_proj.weight"))
    return torch.cat(parts, dim=1 if columns else 0)


@given(sharded_models())
def test_query_heads_are_on_the_rank_of_their_kv_head(drawn: tuple[ModelConfig, int]) -> None:
    model, size = drawn
    for rank in range(size):
        own = Shard(rank, size).config(model)
        first = rank * own.num_heads
        kv = Shard(rank, size).cut(
            ".k_proj.", torch.arange(model.num_kv_heads), (own.num_kv_heads,)
        )
        for head in range(own.num_heads):
            wanted = (first + head) * model.num_kv_heads // model.num_heads
            assert kv[head * own.num_kv_heads // own.num_heads] == wanted


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_compute_what_the_whole_computes(tmp_path: Path, variant: str, size: int) -> None:
    family, overrides = VARIANTS[variant]
    path = make_model(tmp_path, family, **overrides)
    model = ModelConfig.from_dir(path)

    def run(collective: SharedCollective | None) -> list[Tensor]:
        decoder = load_decoder(path, model, torch.float32, "cpu", TorchOps(), collective=collective)
        rows = Rows(decoder, 2, 8, vocab_size=model.vocab_size)
        steps = [[[5, 9, 1, 90], [3]], [[7], [8, 8, 2]]]
        return [logits.clone() for step in steps for logits in rows.step(step)]

    first, *others = on_ranks(size, run)
    for got, wanted in zip(first, run(None), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    for rank, parts in enumerate(others, start=1):
        for part, got in zip(parts, first, strict=True):
            begin = rank * part.shape[1]  # the last may be padded
            assert torch.equal(part[:, : got.shape[1] - begin], got[:, begin:][:, : part.shape[1]])


def test_sizes_that_do_not_divide_are_refused_with_those_that_do() -> None:
    model = replace(NANO, num_heads=12, num_kv_heads=4, intermediate_size=352)
    assert [n for n in range(1, 13) if fits(model, n)] == [1, 2, 4]
    with pytest.raises(
        RequestError, match=r"3 does not divide 12 .* use one of 1, 2, 4$"
    ) as caught:
        check_tensor_parallel(model, 3)
    assert caught.value.param == "tensor_parallel_size"


def test_norms_over_all_heads_are_not_shared(tmp_path: Path) -> None:
    model = ModelConfig.from_dir(make_model(tmp_path, "olmo3"))
    assert tensor_parallel_sizes(model) == [1]
    with pytest.raises(RequestError, match="2: Olmo3ForCausalLM norms") as caught:
        check_tensor_parallel(model, 2)
    assert caught.value.param == "tensor_parallel_size"


def fits(model: ModelConfig, size: int) -> bool:
    try:
        check_tensor_parallel(model, size)
    except RequestError:
        return False
    return True


@given(sharded_models())
def test_the_plan_accepts_what_the_engine_accepts(drawn: tuple[ModelConfig, int]) -> None:
    """KV heads may be replicated; the inner size must be divisible."""
    model, size = drawn
    odd = replace(model, intermediate_size=size * model.intermediate_size + 1)
    for one in (model, odd):
        sizes = tensor_parallel_sizes(one, MAX_RANKS)
        assert sizes == [n for n in range(1, MAX_RANKS + 1) if fits(one, n)] == rank_counts(one)
    assert size in rank_counts(model) and (size == 1 or size not in rank_counts(odd))
    copies = max(size // model.num_kv_heads, 1)
    foot = footprint(model, torch.bfloat16, ranks=size)
    assert foot.kv_bytes_per_token == copies * model.kv_bytes_per_token(torch.bfloat16)
    if size > 1:
        with pytest.raises(RequestError, match="tensor_parallel_size"):
            footprint(odd, torch.bfloat16, ranks=size)


def test_equal_weights_have_equal_digests_and_others_have_others(tmp_path: Path) -> None:
    paths = [make_model(tmp_path / str(i), "llama", seed=seed) for i, seed in enumerate((0, 0, 1))]
    first, same, other = (Checkpoint(path).weights_digest() for path in paths)
    assert first == same != other
