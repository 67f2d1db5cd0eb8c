"""Checks of single values that users pass. Each returns the value as Python's own type, or raises
RequestError that names the field.

Scalars and arrays of numpy, and tensors of torch on the CPU, count as the numbers that they hold.
Knows no field and no class of options.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from s1engine.errors import RequestError

MAX_SHOWN_CHARS = 80
MAX_PATH_CHARS = 4096
MAX_DEPTH = 128

Check = Callable[[str, object], object]
"""Of a field's name and value, to the value as it is kept."""


def check_fields(
    instance: Any, checks: Mapping[str, Check], spellings: Mapping[str, str] | None = None
) -> None:
    """Replaces the fields of a frozen dataclass by what their checks return; a field's own default
    stays. ``spellings``: names of fields in messages, where they differ."""
    for field in fields(instance):
        value = getattr(instance, field.name)
        if value is not field.default:
            param = spellings.get(field.name, field.name) if spellings else field.name
            object.__setattr__(instance, field.name, checks[field.name](param, value))


def int_in(low: int, high: int) -> Check:
    """``check_int`` with these bounds."""
    return partial(check_int, low=low, high=high)


def float_in(low: float, high: float) -> Check:
    """``check_float`` with these bounds."""
    return partial(check_float, low=low, high=high)


def name_in(*allowed: str) -> Check:
    """``check_name`` with these names."""
    return partial(check_name, allowed=allowed)


def or_none(check: Check) -> Check:
    """``check`` that also accepts None."""
    return lambda param, value: None if value is None else check(param, value)


def str_of(max_chars: int, min_chars: int = 0) -> Check:
    """``check_str`` with these lengths."""
    return partial(check_str, max_chars=max_chars, min_chars=min_chars)


def check_int(param: str, value: object, low: int, high: int) -> int:
    """Returns ``value`` if it is an integer, no bool, in [low, high]."""
    plain = _unboxed(value)
    if isinstance(plain, bool) or not isinstance(plain, int):
        raise RequestError(f"{param} must be an integer; got {shown(value)}", param=param)
    if not low <= plain <= high:
        message = f"{param} must be between {low} and {high}; got {shown(plain)}"
        raise RequestError(message, param=param)
    return int(plain)


def check_float(param: str, value: object, low: float, high: float) -> float:
    """Returns ``value`` if it is a finite number, no bool, in [low, high]."""
    plain = _unboxed(value)
    number = isinstance(plain, int | float) and not isinstance(plain, bool)
    if not number or (isinstance(plain, float) and not math.isfinite(plain)):
        raise RequestError(f"{param} must be a finite number; got {shown(value)}", param=param)
    if not low <= plain <= high:
        message = f"{param} must be between {low:g} and {high:g}; got {shown(plain)}"
        raise RequestError(message, param=param)
    return float(plain)


def check_bool(param: str, value: object) -> bool:
    """Returns ``value`` if it is True or False."""
    plain = _unboxed(value)
    if not isinstance(plain, bool):
        raise RequestError(f"{param} must be true or false; got {shown(value)}", param=param)
    return plain


def check_str(param: str, value: object, max_chars: int, *, min_chars: int = 0) -> str:
    """Returns ``value`` if it is a Unicode string of min_chars to max_chars characters."""
    if not isinstance(value, str):
        raise RequestError(f"{param} must be a string; got {shown(value)}", param=param)
    if not min_chars <= len(value) <= max_chars:
        most = f"at most {max_chars}" if min_chars == 0 else f"{min_chars} to {max_chars}"
        raise RequestError(f"{param} must have {most} characters; got {len(value)}", param=param)
    return str.__str__(check_unicode(param, value))


def check_unicode(param: str, text: str) -> str:
    """Returns ``text`` unless it holds a lone surrogate, which UTF-8 cannot encode."""
    return _unicode(param, param, text)


def _unicode(param: str, where: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} holds a lone surrogate", param=param) from error
    return text


def check_name(param: str, value: object, allowed: Sequence[str]) -> str:
    """Returns ``value`` if it is one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        message = f"{param} must be one of {', '.join(allowed)}; got {shown(value)}"
        raise RequestError(message, param=param)
    return str.__str__(value)


def check_path(param: str, value: object) -> str:
    """Returns the path as a string, from a string or a path object."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    text = check_str(param, text, MAX_PATH_CHARS, min_chars=1)
    if "\0" in text:
        raise RequestError(f"{param} holds a null character", param=param)
    return text


def check_list(param: str, value: object, what: str, max_items: int) -> list[Any]:
    """Returns the items of a list, tuple, other sequence or array; ``what`` names their kind. A
    string, a mapping, a set and an iterator are no lists."""
    items = plain_list(value)
    if items is None:
        raise RequestError(f"{param} must be a list of {what}; got {shown(value)}", param=param)
    if len(items) > max_items:
        message = f"{param} must have at most {max_items} {what}; got {len(items)}"
        raise RequestError(message, param=param)
    return items


def check_data(param: str, value: object) -> Any:
    """Returns plain data as JSON has it, copied: mappings with string keys, lists, Unicode strings,
    numbers, booleans and None, at most MAX_DEPTH levels deep."""
    return _data(param, param, value, MAX_DEPTH)


def _data(param: str, where: str, value: object, depth: int) -> Any:
    plain = _unboxed(value)
    if plain is None or isinstance(plain, bool | int | float):
        return plain
    if isinstance(plain, str):
        return str.__str__(_unicode(param, where, plain))
    items = plain_list(plain)
    if items is None and not isinstance(plain, Mapping):
        raise RequestError(f"{where} must be plain data; got {shown(value)}", param=param)
    if depth == 0:
        raise RequestError(f"{param} has more than {MAX_DEPTH} levels", param=param)
    if items is not None:
        return [_data(param, f"{where}[{i}]", item, depth - 1) for i, item in enumerate(items)]
    data = {}
    for key, item in plain.items():
        if not isinstance(key, str):
            raise RequestError(f"{where}: keys must be strings; got {shown(key)}", param=param)
        name = str.__str__(_unicode(param, where, key))
        data[name] = _data(param, f"{where}.{name}", item, depth - 1)
    return data


def check_mapping(param: str, value: object) -> dict[str, Any]:
    """Returns a mapping of plain data as a dict, see ``check_data``."""
    if not isinstance(value, Mapping):
        raise RequestError(f"{param} must be a mapping; got {shown(value)}", param=param)
    data: dict[str, Any] = check_data(param, value)
    return data


def plain_list(value: object) -> list[Any] | None:
    """The items of a sequence or an array; None for anything else, strings included."""
    if isinstance(value, str | bytes | bytearray | memoryview):
        return None
    if isinstance(value, Sequence):
        return list(value)
    tolist = getattr(value, "tolist", None)
    items = tolist() if callable(tolist) and getattr(value, "shape", None) != () else None
    return items if isinstance(items, list) else None


def shown(value: object) -> str:
    """``value`` for a message: its repr on one line, shortened."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer of thousands of digits, or a faulty __repr__
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 3]}..."


def _unboxed(value: object) -> Any:
    """The number in a scalar of numpy or a tensor without dimensions."""
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "shape", None) == () else value
