"""Random weights in place of the model's."""

import shutil
from pathlib import Path

import pytest

from s1engine.config import BUNDLED_MODEL
from s1engine.engine.llm import LLM
from s1engine.errors import ModelError, RequestError
from s1engine.sampling_params import SamplingParams


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The bundled model without its weights."""
    path = tmp_path / "bare"
    shutil.copytree(BUNDLED_MODEL, path, ignore=shutil.ignore_patterns("*.safetensors"))
    return path


def test_a_model_without_weights_runs_on_random_ones(bare: Path) -> None:
    with pytest.raises(ModelError, match="safetensors"):
        LLM(bare, progress=False)
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    answers = []
    for fmt in ("random", "dummy"):
        with LLM(bare, progress=False, load_format=fmt, kv_cache_memory_gb=0.01) as llm:  # type: ignore[arg-type]
            (output,) = llm.generate("a=3", params, progress=False)
        answers.append(output.outputs[0].token_ids)
    assert len(answers[0]) == 5 and answers[0] == answers[1]


def test_ranks_need_the_models_weights(bare: Path) -> None:
    with pytest.raises(RequestError) as error:
        LLM(bare, progress=False, load_format="random", tensor_parallel_size=2)
    assert error.value.param == "load_format"
