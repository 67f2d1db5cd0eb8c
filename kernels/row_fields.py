"""Layout of a row of the device batch: numbers of its fields in ``fields`` [NUM_FIELDS, B] int32.

csrc/core/device_batch.hpp owns the layout. Kernels cannot import the core, so this is a copy;
tests/kernels/test_budget_step.py compares it with the core value by value.
"""

import triton.language as tl

# State, which each step advances. The pending phrase tokens are phrases[pending:pending+remaining];
# ``input`` is the token fed last.
PHASE: tl.constexpr = tl.constexpr(0)
BANNED: tl.constexpr = tl.constexpr(1)
TAIL_NEWLINE: tl.constexpr = tl.constexpr(2)
THINKING_TOKENS: tl.constexpr = tl.constexpr(3)
MAX_THINKING: tl.constexpr = tl.constexpr(4)
WAITS_USED: tl.constexpr = tl.constexpr(5)
PENDING: tl.constexpr = tl.constexpr(6)
REMAINING: tl.constexpr = tl.constexpr(7)
INPUT: tl.constexpr = tl.constexpr(8)
POSITION: tl.constexpr = tl.constexpr(9)
FINISH: tl.constexpr = tl.constexpr(10)
# Parameters. Phrases and stop tokens are slices of ``phrases``; the forced end starts with the
# newline.
MIN_THINKING: tl.constexpr = tl.constexpr(11)
NUM_WAITS: tl.constexpr = tl.constexpr(12)
WAIT_BEGIN: tl.constexpr = tl.constexpr(13)
WAIT_LEN: tl.constexpr = tl.constexpr(14)
WAIT_NEWLINE: tl.constexpr = tl.constexpr(15)
NATURAL_BEGIN: tl.constexpr = tl.constexpr(16)
NATURAL_LEN: tl.constexpr = tl.constexpr(17)
FORCED_BEGIN: tl.constexpr = tl.constexpr(18)
NEWLINE_LEN: tl.constexpr = tl.constexpr(19)
FORCED_LEN: tl.constexpr = tl.constexpr(20)
NEWLINE_ALWAYS: tl.constexpr = tl.constexpr(21)
MAX_LEN: tl.constexpr = tl.constexpr(22)
STOP_BEGIN: tl.constexpr = tl.constexpr(23)
STOP_LEN: tl.constexpr = tl.constexpr(24)
# Inputs of the next step.
INPUT_IDS: tl.constexpr = tl.constexpr(25)
POSITIONS: tl.constexpr = tl.constexpr(26)
CONTEXT_LENS: tl.constexpr = tl.constexpr(27)
SAMPLE_BANNED: tl.constexpr = tl.constexpr(28)

NUM_FIELDS = 29

# Values of ``phase`` and ``finish`` (csrc/core/types.hpp).
THINKING: tl.constexpr = tl.constexpr(1)
ANSWERING: tl.constexpr = tl.constexpr(2)
STOP: tl.constexpr = tl.constexpr(1)
LENGTH: tl.constexpr = tl.constexpr(2)

# In ``output_tokens``: the row had finished or was being fed a phrase.
NO_TOKEN: tl.constexpr = tl.constexpr(-1)
