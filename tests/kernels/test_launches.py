"""Launches that ``bench tune`` tries compute the same as those of the table."""

from dataclasses import replace

import pytest
import torch

from s1engine.bench import tune
from s1engine.bench.launches import (
    KERNELS,
    PRODUCTS,
    LaunchCandidate,
    launch_candidates,
    use_launches,
)
from s1engine.bench.shapes import matrix_shapes, shape
from s1engine.errors import RequestError
from s1engine.kernels import launch_table
from s1engine.models.decoder import Decoder
from s1engine.models.loader import random_decoder
from s1engine.ops.triton_ops import TritonOps

MODEL = replace(
    shape("nano"), num_layers=1, layer_windows=(0,), hidden_size=32, intermediate_size=48,
    num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=40,
)  # fmt: skip


def computed(
    decoder: Decoder, batch: int, chosen: list[LaunchCandidate]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a step with these launches."""
    torch.manual_seed(1)
    step = tune.make_step(decoder, batch, 50)
    with torch.inference_mode(), use_launches(chosen, MODEL):
        return step()


@pytest.mark.parametrize("batch", [2, 3])
def test_a_step_is_the_same_by_every_launch(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tune.BLOCK_SIZES, "cpu", 64)
    decoder = random_decoder(MODEL, torch.float32, "cpu", TritonOps(), quantization=None)
    wanted = computed(decoder, batch, [])
    for kernel in KERNELS:
        candidates = launch_candidates(kernel, batch, MODEL.num_kv_heads)
        assert len(candidates) > 1 and len({choice.name for choice in candidates}) == len(
            candidates
        )
        for choice in (candidates[1], candidates[-1]):
            torch.testing.assert_close(computed(decoder, batch, [choice]), wanted)


@pytest.mark.parametrize("batch", [1, 2, 16, 64])
def test_no_launch_needs_more_workspace_than_there_is(batch: int) -> None:
    for name in ("0.5B", "7B", "32B"):
        for kernel in PRODUCTS:
            n, k = matrix_shapes(shape(name))[kernel]
            for choice in launch_candidates(kernel, batch, 4)[1:]:
                if choice.name == "cuBLAS":
                    continue
                assert choice.value is not None
                tiles = choice.value(batch, n, k, 2)
                programs = launch_table.cdiv(n, tiles.block_n) * tiles.split_k
                if tiles.split_k > 1:
                    assert (
                        programs * (tiles.block_n + 1) * tiles.block_t
                        <= launch_table.SPLIT_K_WORKSPACE[0]
                    )
                    assert programs // tiles.split_k <= launch_table.SPLIT_K_WORKSPACE[1]


def test_a_choice_reaches_its_kernel_alone() -> None:
    n, k = matrix_shapes(MODEL)["o"]
    (_, choice, *_) = launch_candidates("o", 1, 1)
    other = matrix_shapes(MODEL)["down"]
    before = vars(launch_table.skinny_gemm_tiles(1, *other, 2).launch)
    with use_launches([choice], MODEL):
        assert choice.value is not None
        assert vars(launch_table.skinny_gemm_tiles(1, n, k, 2).launch) == vars(
            choice.value(1, n, k, 2).launch
        )
        assert vars(launch_table.skinny_gemm_tiles(1, *other, 2).launch) == before


def test_no_gpu_is_said_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    import argparse

    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    with pytest.raises(RequestError, match="CUDA"):
        tune.run(parser.parse_args([]))
