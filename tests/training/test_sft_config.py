"""Recipes: the bundled ones fit their GPUs by the estimate, and errors name the field."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from s1engine.errors import RequestError
from s1engine.training.sft import resources
from s1engine.training.sft.__main__ import main, parse_overrides
from s1engine.training.sft.model import load_architecture
from s1engine.training.sft.sft_config import CONFIGS, SftConfig
from tests.shared_data import shared_file

GOOD: dict[str, Any] = {"data": ["d.jsonl"], "out": "o", "model": "m"}
BUNDLED = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rat": 1}, "learning_rat is no field"),
        ({"data": None}, "data is missing"),
        ({"data": []}, "data must name"),
        ({"data": [3]}, "data must be a list"),
        ({"model": None}, "model is missing"),
        ({"epochs": 0}, "epochs must be between"),
        ({"epochs": 1.5}, "epochs must be an integer"),
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
        ({"beta2": 1.0}, "beta2 must be between"),
        ({"too_long": "cut"}, "too_long must be one of"),
        ({"offload": True}, "offload must be text"),
        ({"packing": "yes"}, "packing must be true or false"),
        ({"architecture": {"hidden_size": 3}}, "architecture must hold"),
    ],
)
def test_errors_name_the_field(change: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named) as caught:
        SftConfig.from_dict(GOOD | change)
    assert caught.value.param == next(iter(change))


def test_numbers_that_yaml_reads_as_text(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("data: d.jsonl\nout: o\nmodel: m\nlearning_rate: 1e-5\n")
    assert SftConfig.read(file).learning_rate == 1e-5
    assert SftConfig.read(file, epochs=2).epochs == 2
    assert SftConfig.from_dict(SftConfig.read(file).to_json()) == SftConfig.read(file)


def test_files_that_are_not_recipes(tmp_path: Path) -> None:
    for text in ("- 1\n", "a: [\n"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(RequestError):
            SftConfig.read(tmp_path / "bad.yaml")
    with pytest.raises(RequestError, match="s1_32b_8xh100"):
        SftConfig.read(tmp_path / "nowhere.yaml")
    with pytest.raises(RequestError, match="name=value"):
        parse_overrides(["epochs"])
    assert parse_overrides(["epochs=3", "data=[a, b]"]) == {"epochs": 3, "data": ["a", "b"]}


def test_the_command_prints_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["s1_nano", "--set", "epochs=none"]) == 1
    assert capsys.readouterr().err.startswith("error: epochs must be an integer")


@pytest.mark.parametrize("name", BUNDLED)
def test_every_bundled_recipe_fits_its_gpus(name: str) -> None:
    config = SftConfig.read(Path(name))
    architecture = load_architecture(config)
    memory = resources.estimate_memory(config, architecture, config.block_size, config.gpus)
    assert memory.total <= 80e9 - resources.RESERVED_BYTES
    assert "H100 80 GB: fits" in resources.resource_report(config)


@pytest.mark.parametrize("name", ["s1_32b_16xh100", "s1_32b_8xh100"])
def test_the_estimate_matches_s1(name: str) -> None:
    """315 steps; and s1's 7 H100-hours lie between the hours at the two shares of the peak."""
    config = SftConfig.read(Path(name))
    work = resources.estimate_work(config, load_architecture(config))
    assert work.steps == 315 and config.block_size == 32768
    hours = [work.flops / (989e12 * share) / 3600 for share in resources.UTILISATIONS]
    assert hours[1] < 7 < 1.2 * hours[0]


def test_without_offload_the_original_recipe_does_not_fit_eight() -> None:
    config = SftConfig.read(Path("s1_32b_8xh100"), offload="none")
    memory = resources.estimate_memory(config, load_architecture(config), config.block_size, 8)
    assert memory.total > 80e9
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(65.5e9, rel=0.01)


@pytest.mark.parametrize(("recipe", "size"), [("s1_32b_8xh100", "32B"), ("s1_1_7b_8xh100", "7B"),
                                              ("s1_1_14b_8xh100", "14B")])  # fmt: skip
def test_architectures_are_the_published_ones(recipe: str, size: str) -> None:
    published = AutoConfig.from_pretrained(
        shared_file(f"tokenizer/configs/Qwen2.5-{size}-Instruct.config.json")
    )
    own = load_architecture(SftConfig.read(Path(recipe)))
    for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "tie_word_embeddings", "rms_norm_eps",
        "rope_parameters", "max_position_embeddings",
    ):  # fmt: skip
        assert getattr(own, name) == getattr(published, name), name


def test_an_estimate_without_data_needs_expected_numbers() -> None:
    config = SftConfig.read(Path("s1_nano"), expected_samples=0)
    with pytest.raises(RequestError, match="expected_samples"):
        resources.resource_report(config)
