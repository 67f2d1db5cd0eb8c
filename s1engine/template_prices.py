"""What calls, filters and tests of a template cost, and the filters that read and write JSON.

Each pays before it runs, for what it reads and for the most that it can return.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from string import Formatter
from typing import Any

from jinja2 import pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Macro

from s1engine.template_work import ENTRY, SEEN, STEP, MeteredContext, Work, check_bits, num_bits

MAX_WIDTH = 2**10  # of a field, an indent, a row
SLOW = 8  # times the price of a copy

COPYING = frozenset(
    {
        *("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "format", "format_map"),
        *("split", "rsplit", "splitlines", "partition", "rpartition"),
        *("upper", "lower", "title", "capitalize", "casefold", "swapcase"),
    }
)
"""Methods of a text that return a part or a copy of it."""
NEW_TEXT = ("center", "ljust", "rjust", "zfill", "expandtabs", "replace", "join")
"""Those whose result may be longer."""
_FIXED_PRICE = ("attr", "count", "d", "default", "first", "items", "last", "length", "random")
_BY_SIZE = (
    *("batch", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"),
    *("slice", "sum", "float", "int", "abs", "round"),
)
_WIDE = ("batch", "center", "indent", "round", "wordwrap")  # their integers are sizes
_PERCENT_FIELD = re.compile(r"%(?:\([^)]*\))?[#0 +-]*(\*|\d*)(?:\.(\*|\d*))?")


def work_of(context: Context) -> Work:
    """The work of the rendering."""
    assert isinstance(context, MeteredContext)
    return context.work


# --- calls ---


def pay_for_call(
    work: Work, owner: Any, called: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Spends what a call that is no method of a text costs before it runs."""
    if isinstance(called, Macro):
        return
    size = (work.walk(args) if args else 0) + (work.walk(kwargs) if kwargs else 0)
    if isinstance(called, TextFormat):
        work.spend(size * called.text.count("{"))
    elif isinstance(owner, list | tuple):
        work.spend(size * len(owner))


def pay_for_method(
    work: Work, text: str, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Spends the length of what a method of ``text`` reads and returns."""
    if name in COPYING:
        work.spend(len(text))
        return
    size = (work.walk(args) if args else 0) + (work.walk(kwargs) if kwargs else 0)
    if name not in NEW_TEXT:
        work.spend(len(text) // SEEN)
    elif name == "replace":
        work.spend(_price_of_replace(work, text, args, kwargs, size))
    elif name == "join":
        if args and not isinstance(args[0], str | list | tuple | dict):
            raise SecurityError("join expects a list")
        work.spend(size + (len(text) + 1) * len(args[0] if args else ()))
    else:
        _check_widths(name, args, kwargs)
        work.spend(len(text) + MAX_WIDTH * (text.count("\t") + 1))


def _check_widths(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise SecurityError(f"{name}: a width of {value:d} is above the limit of {MAX_WIDTH}")


def price_of_percent(work: Work, layout: str, values: Any) -> int:
    """Of ``layout % values``."""
    fields = _PERCENT_FIELD.findall(layout)
    for widths in fields:
        if any(width == "*" or len(width) > 3 for width in widths):
            raise SecurityError("%: the width of a field must be a number of at most three digits")
    return len(layout) + len(fields) * (work.walk(values) + MAX_WIDTH)


class TextFormat:
    """``str.format`` of one text, in the sandbox and with short fields only."""

    def __init__(self, text: str, formatted: Callable[..., str]) -> None:
        self.text = text
        self._formatted = formatted

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        """The text with its fields filled in."""
        for _, _, layout, _ in Formatter().parse(self.text):
            if layout and re.search(r"\d{4}|[{]", layout):
                raise SecurityError("format: a width must be a number of at most three digits")
        return self._formatted(*args, **kwargs)


# --- filters and tests ---


def priced_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for what it reads and returns."""
    passed = getattr(function, "jinja_pass_arg", None)
    kind = None if passed is None else passed.name
    fixed, by_size, wide = name in _FIXED_PRICE, name in _BY_SIZE, name in _WIDE
    price = _PRICES.get(name)

    def call(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if kind is None:
            return function(value, *args, **kwargs)
        passed = {"context": context, "eval_context": context.eval_ctx}
        return function(passed.get(kind, context.environment), value, *args, **kwargs)

    @pass_context
    def priced(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        work: Work = context.work
        work.spend(STEP)
        if fixed:
            result = call(context, value, *args, **kwargs)
            return work.counted(result) if isinstance(result, Iterator) else result
        if by_size:
            work.spend_size(value)
        elif isinstance(value, str):
            work.spend(len(value))
        else:
            if isinstance(value, Iterator):
                value = list(value)
            work.walk(value)
        size = (work.walk(args) if args else 0) + (work.walk(kwargs) if kwargs else 0)
        if wide:
            _check_widths(name, args, kwargs)
        if price is not None:
            work.spend(price(work, value, args, kwargs, size))
        result = call(context, value, *args, **kwargs)
        if isinstance(result, str):
            work.spend(len(result))
        elif isinstance(result, Iterator):
            return work.counted(result)
        else:
            work.spend_size(result)
            check_bits(num_bits(result))
        return result

    return priced


def priced_test(function: Callable[..., Any]) -> Callable[..., Any]:
    """A test that pays for what it compares."""

    @pass_context
    def priced(context: Any, value: Any, *args: Any) -> Any:
        work: Work = context.work
        size = work.walk(value)
        for other in args:
            size += work.walk(other)
            if isinstance(other, Sized) and not isinstance(other, str | dict):
                work.spend(size * len(other))
        check_bits(num_bits(value))
        return function(value, *args)

    return priced


_Price = Callable[[Work, Any, Sequence[Any], Mapping[str, Any], int], int]


def _price_of_join(work: Work, value: Any, args: Any, kwargs: Any, size: int) -> int:
    return work.walk(value) + (size + 1) * len(value)


def _price_of_replace(work: Work, value: Any, args: Any, kwargs: Any, size: int) -> int:
    text, old = str(value), args[0] if args else kwargs.get("old")
    return len(text) + (text.count(str(old)) + 1) * size


def _price_of_words(work: Work, value: Any, args: Any, kwargs: Any, size: int) -> int:
    """Of regular expressions over a text."""
    return SLOW * len(str(value))


def _price_of_wordwrap(work: Work, value: Any, args: Any, kwargs: Any, size: int) -> int:
    return (len(str(value)) + 1) * (size + SLOW)


def _price_of_indent(work: Work, value: Any, args: Any, kwargs: Any, size: int) -> int:
    return (str(value).count("\n") + 1) * (MAX_WIDTH + size)


def _price_of_format(work: Work, value: Any, args: Any, kwargs: Any, size: int) -> int:
    return price_of_percent(work, str(value), kwargs or args)


def _price_of_sum(work: Work, value: Any, args: Any, kwargs: Any, size: int) -> int:
    for start in (*args[1:], kwargs.get("start", 0)):
        if not isinstance(start, int | float):
            raise SecurityError("sum: start must be a number")
    return 0


_PRICES: dict[str, _Price] = {
    "join": _price_of_join,
    "replace": _price_of_replace,
    "indent": _price_of_indent,
    "wordwrap": _price_of_wordwrap,
    "format": _price_of_format,
    "sum": _price_of_sum,
    **dict.fromkeys(("striptags", "title", "truncate", "urlencode", "wordcount"), _price_of_words),
}
"""What a filter's result costs beyond the size of its value."""


@pass_context
def to_json(
    context: Any,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    **how: Any,
) -> str:
    """Plain JSON; Jinja's own filter escapes HTML."""
    work: Work = context.work
    if context.environment.shares_values:
        work.walk(value)
    if indent is None and "separators" not in how:
        text = json.dumps(value, ensure_ascii=ensure_ascii, **how)
        work.spend(len(text))
        return text
    _check_widths("tojson", (len(indent) if isinstance(indent, str) else indent,), {})
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, **how)
    pieces = []
    for piece in encoder.iterencode(value):
        work.spend(len(piece))
        pieces.append(piece)
    return "".join(pieces)


@pass_context
def from_json(context: Any, text: Any) -> Any:
    """The value of a JSON text; a value that is no text is returned as it is."""
    if not isinstance(text, str):
        return text
    context.work.spend(ENTRY * len(text))
    return json.loads(text)
