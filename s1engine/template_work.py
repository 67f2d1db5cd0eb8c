"""The budget of one rendering of a chat template, and the prices of values.

Templates come from model directories and their values from requests, so either can ask for loops
of loops, strings of gigabytes, or containers that hold one another a billion times over. Work is
counted in characters: of all texts that are made, with fixed prices for what else takes time. It
depends on template and values only, never on the machine. ``template_meters`` and
``template_prices`` spend it.
"""

from collections.abc import ItemsView, Iterator, KeysView, Set, ValuesView
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Undefined
from jinja2.utils import Namespace

FREE_WORK = 2**25  # characters; the worst attack known took 3 s
WORK_PER_CHAR = 64  # of the messages, besides
STEP = 64  # a pass of a loop, a call
ENTRY = 16  # of a list or a dict
SEEN = 8  # characters read for each one made
MAX_INT_BITS = 2**10
KEY = "<work>"  # variable of the context; no template can spell it

CONTAINERS = (list, tuple, dict, range, Set, KeysView, ValuesView, ItemsView)
ATOMS = frozenset({int, float, bool, type(None), Undefined})


class TooMuchWorkError(SecurityError):
    """A rendering has spent its budget."""


class Work:
    """What one rendering may still spend."""

    __slots__ = ("left",)

    def __init__(self, num_chars: int) -> None:
        """``num_chars``: length of the messages."""
        self.left = FREE_WORK + WORK_PER_CHAR * num_chars

    def spend(self, amount: int) -> None:
        """Raises TooMuchWorkError if there is not as much left."""
        self.left -= amount
        if self.left < 0:
            raise TooMuchWorkError(
                "it makes more text, or takes more steps, than a chat of this length may need"
            )

    def spend_size(self, value: Any) -> None:
        """Spends what a copy of ``value`` costs: of its entries, not of what they hold."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, CONTAINERS):
            self.spend(ENTRY * len(value))

    def walk(self, value: Any) -> int:
        """Spends, and returns, what it costs to visit all that ``value`` holds."""
        kind = type(value)
        if kind in ATOMS:
            return 1
        if kind is str:
            self.spend(len(value) // SEEN)
            return len(value)
        total, pending = 1, [value]
        while pending:
            item = pending.pop()
            kind = type(item)
            if kind in ATOMS:
                continue
            if kind is str:
                cost = len(item)
            elif kind is list or kind is tuple:
                cost = ENTRY * len(item)
                pending += item
            else:
                cost = self._open(item, pending)
            self.spend(cost)
            total += cost
        return total

    def _open(self, item: Any, pending: list[Any]) -> int:
        """Appends to ``pending`` what a rarer container holds; returns its price."""
        if isinstance(item, dict):
            pending += item
            pending += item.values()
        elif isinstance(item, range):
            return ENTRY * len(item)
        elif isinstance(item, CONTAINERS):
            pending += item
        elif isinstance(item, Namespace):
            pending.append(object.__getattribute__(item, "_Namespace__attrs"))
            return ENTRY
        else:
            return len(item) if isinstance(item, str) else 1
        return ENTRY * len(item)

    def counted(self, values: Iterator[Any]) -> Iterator[Any]:
        """``values``, each at the price of a step."""
        for value in values:
            self.spend(STEP)
            yield value


class MeteredContext(Context):
    """A context with the work of its rendering, which contexts derived from it share."""

    def __init__(self, environment: Any, parent: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(environment, parent, *args, **kwargs)
        self.work: Work = parent[KEY]


def num_bits(value: Any) -> int:
    """Of an integer; 0 for anything else."""
    return value.bit_length() if isinstance(value, int) else 0


def check_bits(bits: int) -> None:
    """Raises SecurityError for the length of an integer that no chat needs."""
    if bits > MAX_INT_BITS:
        raise SecurityError(f"it computes with an integer of more than {MAX_INT_BITS} bits")
