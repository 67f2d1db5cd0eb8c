"""Layout of a row of the device batch: numbers of its fields in ``fields`` [NUM_FIELDS, B] int32.

csrc/core/device_batch.hpp owns the layout. Kernels cannot import the core, so this is a copy;
tests/kernels/test_budget_step.py compares it with the core value by value.
"""

import triton.language as tl

# State, which each step advances. The pending phrase tokens are phrases[pending:pending+remaining];
# ``input`` is the token fed last. ``match``, ``held`` and ``starts`` belong to the end matcher.
PHASE: tl.constexpr = tl.constexpr(0)
BANNED: tl.constexpr = tl.constexpr(1)
TAIL_NEWLINE: tl.constexpr = tl.constexpr(2)
THINKING_TOKENS: tl.constexpr = tl.constexpr(3)
MAX_THINKING: tl.constexpr = tl.constexpr(4)
WAITS_USED: tl.constexpr = tl.constexpr(5)
MATCH: tl.constexpr = tl.constexpr(6)
HELD: tl.constexpr = tl.constexpr(7)
STARTS: tl.constexpr = tl.constexpr(8)
PENDING: tl.constexpr = tl.constexpr(9)
REMAINING: tl.constexpr = tl.constexpr(10)
INPUT: tl.constexpr = tl.constexpr(11)
POSITION: tl.constexpr = tl.constexpr(12)
FINISH: tl.constexpr = tl.constexpr(13)
# Parameters. Phrases and stop tokens are slices of ``phrases``; the forced end starts with the
# newline.
MIN_THINKING: tl.constexpr = tl.constexpr(14)
NUM_WAITS: tl.constexpr = tl.constexpr(15)
WAIT_BEGIN: tl.constexpr = tl.constexpr(16)
WAIT_LEN: tl.constexpr = tl.constexpr(17)
WAIT_NEWLINE: tl.constexpr = tl.constexpr(18)
NATURAL_BEGIN: tl.constexpr = tl.constexpr(19)
NATURAL_LEN: tl.constexpr = tl.constexpr(20)
AFTER_MARKER_BEGIN: tl.constexpr = tl.constexpr(21)
AFTER_MARKER_LEN: tl.constexpr = tl.constexpr(22)
FORCED_BEGIN: tl.constexpr = tl.constexpr(23)
NEWLINE_LEN: tl.constexpr = tl.constexpr(24)
FORCED_LEN: tl.constexpr = tl.constexpr(25)
NEWLINE_ALWAYS: tl.constexpr = tl.constexpr(26)
MAX_LEN: tl.constexpr = tl.constexpr(27)
STOP_BEGIN: tl.constexpr = tl.constexpr(28)
STOP_LEN: tl.constexpr = tl.constexpr(29)
# Inputs of the next step.
INPUT_IDS: tl.constexpr = tl.constexpr(30)
POSITIONS: tl.constexpr = tl.constexpr(31)
CONTEXT_LENS: tl.constexpr = tl.constexpr(32)
SAMPLE_BANNED: tl.constexpr = tl.constexpr(33)

NUM_FIELDS = 34

# Values of ``phase`` and ``finish`` (csrc/core/types.hpp).
THINKING: tl.constexpr = tl.constexpr(1)
ANSWERING: tl.constexpr = tl.constexpr(2)
STOP: tl.constexpr = tl.constexpr(1)
LENGTH: tl.constexpr = tl.constexpr(2)

# In ``output_tokens``: the row had finished or was being fed a phrase.
NO_TOKEN: tl.constexpr = tl.constexpr(-1)

# In the table of the end matcher (csrc/core/end_matcher.hpp): a marker is complete from here on.
COMPLETE: tl.constexpr = tl.constexpr(128)
