"""Typed reading of a model's JSON files. Owns the error messages: file, field, what is wrong.

Knows no field by name. A null field counts as absent: Hugging Face writes absent fields so.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s1engine.checks import shown
from s1engine.errors import ModelError
from s1engine.model_files import read_json

MAX_INT = 2**31 - 1


class ConfigReader:
    """One JSON object. Each method reads a field with its type and bounds, or raises ModelError."""

    def __init__(
        self,
        file: Path,
        values: dict[str, Any],
        prefix: str = "",
        read: set[str] | None = None,
    ) -> None:
        self.file = file
        self._values = values
        self._prefix = prefix
        self._read = set() if read is None else read

    @classmethod
    def read(cls, file: Path) -> "ConfigReader":
        """The JSON object in ``file``."""
        try:
            return cls(file, read_json(file))
        except FileNotFoundError:
            raise ModelError(f"{file}: no such file") from None

    def with_defaults(
        self, defaults: dict[str, Any], overrides: dict[str, Any] | None = None
    ) -> "ConfigReader":
        """The same object with values for fields that it does not mention, and with other values
        for some. A field that it mentions as null stays absent."""
        values = {**defaults, **self._values, **(overrides or {})}
        return ConfigReader(self.file, values, self._prefix, self._read)

    def unread(self) -> list[str]:
        """Fields that no method has been asked for."""
        return [key for key in self._values if key not in self._read]

    def error(self, key: str, why: str) -> ModelError:
        """An error about ``key``, for the caller to raise."""
        return ModelError(f"{self.file}: {self._prefix}{key} {why}")

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def get(self, key: str) -> Any:
        """The JSON value, None if absent."""
        self._read.add(key)
        return self._values.get(key)

    def integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_INT
    ) -> int:
        """An integer in [low, high]; without a default the field is required."""
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"must be an integer from {low} to {high}; got {shown(value)}")
        return value

    def number(
        self, key: str, default: float | None = None, *, low: float = 0.0, high: float = 1e30
    ) -> float:
        """A finite number in [low, high]; without a default the field is required."""
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number; got {shown(value)}")
        if not low <= value <= high or not math.isfinite(value):
            raise self.error(key, f"must be from {low:g} to {high:g}; got {shown(value)}")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero; without a default the field is required."""
        value = self.number(key, default)
        if value == 0:
            raise self.error(key, "must be above 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._present(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false; got {shown(value)}")
        return value

    def section(self, key: str) -> "ConfigReader":
        """A nested object; an empty one if absent."""
        value = self._present(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object; got {shown(value)}")
        return ConfigReader(self.file, value, f"{self._prefix}{key}.")

    def _present(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        return value
