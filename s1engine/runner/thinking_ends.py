"""Which tokens end the thinking, so that a sampler can ban them where the budget requires.

Owns the ids by ban code (``ban_code`` of csrc/core/budget.hpp): 0 bans nothing; 1 + s bans the
triggers and the tokens that complete an end marker from state s of the end matcher.
The samplers know the ids of BAN_ENDS, a sequence's own stop tokens.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

import numpy as np

from s1engine import _core


@dataclass(frozen=True, slots=True)
class EndTables:
    """The end matcher of a format whose ends are several tokens (csrc/core/end_matcher.hpp)."""

    next_state: np.ndarray
    """[states, V] uint8: the state after a token; from ``END_COMPLETE`` on a marker is complete."""
    depths: np.ndarray
    """[states] int32: bytes of a marker that a state has matched."""
    token_lens: np.ndarray
    """[V] uint8: bytes of a token, 1 to 31."""

    @classmethod
    def of(cls, fmt: _core.BudgetFormat | None) -> "EndTables | None":
        """Views of the matcher's tables; None without one."""
        if fmt is None or not fmt.end_depths.size:
            return None
        return cls(fmt.end_table, fmt.end_depths, fmt.end_token_lens)


@dataclass(frozen=True, slots=True)
class ThinkingEnds:
    """Ids that end the thinking. ``tables`` None: the triggers only."""

    triggers: tuple[int, ...] = ()
    tables: EndTables | None = None
    _by_code: dict[int, np.ndarray] = field(default_factory=dict)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays by name, for another process."""
        arrays = {"triggers": np.array(self.triggers, np.int64)}
        return arrays if self.tables is None else arrays | asdict(self.tables)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "ThinkingEnds":
        """What ``to_arrays`` was called on; other names are ignored."""
        names = [field.name for field in fields(EndTables)]
        tables = EndTables(*(arrays[name] for name in names)) if names[0] in arrays else None
        return cls(tuple(arrays["triggers"].tolist()), tables)

    @property
    def codes(self) -> range:
        """All ban codes that forbid something."""
        return range(1, 2 if self.tables is None else 1 + len(self.tables.next_state))

    def ids(self, code: int) -> np.ndarray:
        """Ids [n] int64 that ban code ``code`` > 0 forbids."""
        if code not in self._by_code:
            triggers = np.array(self.triggers, np.int64)
            if self.tables is not None:
                completes = np.flatnonzero(self.tables.next_state[code - 1] >= _core.END_COMPLETE)
                triggers = np.union1d(triggers, completes)
            self._by_code[code] = triggers
        return self._by_code[code]
