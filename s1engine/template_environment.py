"""What a chat template of the hub may use: Jinja's immutable sandbox, and its names and filters.

Block trimming, names and JSON are those of transformers; ``from_json`` is other engines'. Values
are plain data, of which a template may call what is listed here. Calls, filters and operators are
priced before they run (template_prices.py). Knows no messages.
"""

import traceback
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from s1engine.template_meters import METERS, add_meters
from s1engine.template_prices import (
    COPYING,
    MAX_WIDTH,
    NEW_TEXT,
    TextFormat,
    from_json,
    pay_for_call,
    pay_for_method,
    price_of_percent,
    priced_filter,
    priced_test,
    to_json,
    work_of,
)
from s1engine.template_work import ENTRY, STEP, MeteredContext, check_bits, num_bits

MAX_TEMPLATE_CHARS = 2**17
MAX_REASON_CHARS = 1024
_FILE_NAME = "<template>"  # Jinja's name for a template from text

_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        {
            *COPYING,
            *("startswith", "endswith", "find", "rfind", "index", "rindex", "count"),
            *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower"),
            *("isnumeric", "isprintable", "isspace", "istitle", "isupper", *NEW_TEXT),
        }
    ),
    dict: frozenset({"items", "keys", "values", "get", "copy"}),
    list: frozenset({"index", "count", "copy"}),
    tuple: frozenset({"index", "count"}),
    int: frozenset(),
    float: frozenset(),
}
"""What may be called of plain data. ``bool`` is an int."""
_NAMES_OF_DICT = frozenset(dir(dict))

_LEFT_OUT_FILTERS, _LEFT_OUT_NAMES = ("pprint", "urlize"), ("lipsum",)
_COMPARING_TESTS = {"in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">="}
_COMPARING_TESTS |= {"<", "lt", "lessthan", "le", "<=", "lower", "upper", "divisibleby"}


def failing_line(error: Exception) -> int | None:
    """The template's line where ``error`` was raised: Jinja gives its frames these numbers."""
    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == _FILE_NAME]
    return lines[-1] if lines else None


class RefusedError(TemplateError):
    """The template called ``raise_exception``."""


def compile_template(source: str, names: Mapping[str, str]) -> Template:
    """The template of ``source``, which knows the variables ``names``. It is rendered with a Work
    under ``template_work.KEY``. Raises any exception that Jinja or Python's compiler raises."""
    if len(source) > MAX_TEMPLATE_CHARS:
        raise TemplateError(f"it has {len(source)} characters; the limit is {MAX_TEMPLATE_CHARS}")
    environment = create_environment()
    tree = environment.parse(source)
    environment.shares_values = add_meters(tree, environment)
    return environment.from_string(tree, globals=dict(names))


def create_environment() -> "_Sandbox":
    """An environment with the block trimming, names and JSON that templates of the hub expect."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    filters, tests, names = environment.filters, environment.tests, environment.globals
    filters.update(from_json=from_json, fromjson=from_json)
    for name in _LEFT_OUT_FILTERS:
        del filters[name]
    for name in _LEFT_OUT_NAMES:
        del names[name]
    filters.update({name: priced_filter(name, own) for name, own in filters.items()})
    filters.update(METERS, tojson=to_json)
    comparing: dict[str, Any] = {name: tests[name] for name in _COMPARING_TESTS}
    tests.update({name: priced_test(own) for name, own in comparing.items()})
    names.update(
        raise_exception=_refuse,
        strftime_now=_strftime_now,
        namespace=_namespace,
        dict=_Dict(),
        from_json=from_json,
    )
    return environment


class _GenerationTag(Extension):
    """Renders ``{% generation %}``, which marks the assistant's part for trainers, as its content.
    Variables set inside it are local to it, as in transformers."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox that also prices what it runs."""

    intercepted_binops = frozenset({"*", "**", "%", "/", "//"})
    context_class = MeteredContext
    shares_values = True
    """The template can make values that hold one value many times."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        # A shorter way to what Jinja finds: a name that dicts do not have is a key or missing.
        if type(obj) is dict and attribute not in _NAMES_OF_DICT:
            if attribute in obj:
                return obj[attribute]
            return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        kind = type(obj)
        if kind is LoopContext or kind is _Namespace:
            return not attr.startswith("_")
        for base in kind.__mro__:
            if base in _METHODS:
                return attr in _METHODS[base]
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        return None if formatted is None else TextFormat(value.__self__, formatted)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        work = work_of(context)
        if operator == "%" and isinstance(left, str):
            work.spend(price_of_percent(work, left, right))
        elif operator == "**":
            power = abs(right) if isinstance(right, int) else 1
            check_bits(num_bits(left) * power)
        else:
            for repeated, count in ((left, right), (right, left)):
                if isinstance(repeated, str | list | tuple) and isinstance(count, int):
                    entry = 1 if isinstance(repeated, str) else ENTRY
                    work.spend(entry * len(repeated) * max(count, 0))
            check_bits(num_bits(left) + num_bits(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        work = work_of(context)
        work.spend(STEP)
        for local in ("_loop_vars", "_block_vars"):  # for functions that want a context: none does
            kwargs.pop(local, None)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            pay_for_method(work, owner, obj.__name__, args, kwargs)
            result = obj(*args, **kwargs)  # one of _METHODS
        else:
            if obj is not _namespace:
                pay_for_call(work, owner, obj, args, kwargs)
            result = super().call(context, obj, *args, **kwargs)
        if isinstance(result, list | dict):
            work.spend_size(result)
        return result


# --- names ---


def _refuse(message: object) -> None:
    raise RefusedError(" ".join(str(message)[:MAX_REASON_CHARS].split()))


def _strftime_now(layout: str) -> str:
    if len(layout) > MAX_WIDTH:
        raise SecurityError(f"strftime_now: a layout of more than {MAX_WIDTH} characters")
    return datetime.now().strftime(layout)


class _Namespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _namespace(*args: Any, **values: Any) -> Namespace:
    fields = dict(*args, **values)
    for name in fields:
        _check_name(name)
    return _Namespace(fields)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError("names in a namespace must not begin with an underscore")


class _Dict:
    """``dict`` of Python, as far as templates need it."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """A dictionary of these keys."""
        return dict.fromkeys(*args)
