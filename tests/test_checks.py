"""Checks of single values: what is accepted, as what, and the error of anything else."""

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import s1engine
from s1engine import _core, checks, config, sampling_params
from s1engine.checks import check_bool, check_float, check_int, check_list, check_path, check_str
from s1engine.config import EngineConfig
from s1engine.engine.core_output import END_REASONS, FINISH_REASONS
from s1engine.errors import RequestError
from s1engine.options import REQUEST_CHECKS, EngineOptions, RequestOptions, check_option_names
from s1engine.sampling_params import SamplingParams, ThinkingBudget

BOXES = [
    int,
    np.int64,
    np.uint8,
    np.int16,
    lambda n: np.array(n),
    lambda n: torch.tensor(n),
]


@given(st.sampled_from(BOXES), st.integers(0, 100))
def test_integers_of_every_kind_are_pythons(box: Any, number: int) -> None:
    assert check_int("x", box(number), 0, 100) == number
    assert type(check_int("x", box(number), 0, 100)) is int
    assert type(check_float("x", box(number), 0, 100)) is float


@given(st.sampled_from([float, np.float32, np.float64, torch.tensor]), st.floats(0, 1, width=32))
def test_floats_of_every_kind_are_pythons(box: Any, number: float) -> None:
    assert check_float("x", box(number), 0.0, 1.0) == number
    with pytest.raises(RequestError, match="x must be an integer"):
        check_int("x", box(number), 0, 1)


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), "1", None, 1j, [1], {}])
def test_other_values_are_no_numbers(value: object) -> None:
    for check in (check_int, check_float):
        with pytest.raises(RequestError, match="x must be") as raised:
            check("x", value, 0, 2)
        assert raised.value.param == "x"


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 10**400, -(10**5000)],
    ids=["nan", "inf", "no float", "no text"],
)
def test_numbers_without_a_float_are_refused_in_one_short_line(value: float) -> None:
    with pytest.raises(RequestError) as raised:
        check_float("x", value, 0, 2)
    assert len(str(raised.value)) < 200 and "\n" not in str(raised.value)


def test_booleans() -> None:
    assert check_bool("x", np.True_) is True
    for value in (1, 0, "true", None, np.array([True])):
        with pytest.raises(RequestError, match="x must be true or false"):
            check_bool("x", value)


def test_lists() -> None:
    lists = [[1, 2], (1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2])]
    assert all(check_list("x", value, "ids", 2) == [1, 2] for value in lists)
    for value in ("12", b"12", {1, 2}, {1: 2}, iter([1, 2]), 12, np.int64(1), None):
        with pytest.raises(RequestError, match="x must be a list of ids"):
            check_list("x", value, "ids", 2)
    with pytest.raises(RequestError, match="at most 2 ids; got 3"):
        check_list("x", [1, 2, 3], "ids", 2)


def test_texts_and_paths() -> None:
    assert check_path("x", Path("a") / "b") == "a/b"
    assert type(check_str("x", np.str_("a"), 9)) is str
    for value in (b"a", 1, None, "\ud800", "a" * 10):
        with pytest.raises(RequestError, match=r"^x "):
            check_str("x", value, 9)
    for path in ("", "a\0b", b"a", Path("a\ud800")):
        with pytest.raises(RequestError, match=r"^x "):
            check_path("x", path)


def test_a_value_with_a_faulty_repr_is_shown_by_its_type() -> None:
    class Faulty:
        def __repr__(self) -> str:
            raise KeyError("oops")

    assert checks.shown(Faulty()) == "a value of type Faulty"
    assert checks.shown("a" * 10**6).endswith("...") and len(checks.shown("a" * 10**6)) == 80
    assert checks.shown(np.zeros((3, 3))).count("\n") == 0


@pytest.mark.parametrize(
    ("cls", "table"),
    [
        (EngineConfig, config.CHECKS),
        (SamplingParams, sampling_params.CHECKS),
        (ThinkingBudget, sampling_params.BUDGET_CHECKS),
    ],
)
def test_every_field_has_a_check(cls: Any, table: dict[str, object]) -> None:
    assert list(table) == [field.name for field in dataclasses.fields(cls)]


def test_typed_options_are_the_options_there_are() -> None:
    engine = {k: v for k, v in get_type_hints(EngineConfig).items() if k != "model"}
    assert get_type_hints(EngineOptions) == engine
    assert list(REQUEST_CHECKS) == list(RequestOptions.__annotations__)


def test_names_of_ends_are_the_cores() -> None:
    for names, core in ((FINISH_REASONS, _core.FinishReason), (END_REASONS, _core.EndReason)):
        assert [(name or "none").upper() for name in names] == list(core.__members__)


def test_exports_are_there() -> None:
    for name in s1engine.__all__:
        assert getattr(s1engine, name) is not None


def test_the_nearest_option_is_named() -> None:
    check_option_names(["seed"], EngineOptions.__annotations__)
    with pytest.raises(RequestError, match="unknown option max_seqs: did you mean") as raised:
        check_option_names(["max_seqs"], EngineOptions.__annotations__)
    assert raised.value.param == "max_seqs"
    with pytest.raises(RequestError, match="unknown option zzz: options are a, b"):
        check_option_names(["zzz"], ["b", "a"])
