"""What a grammar may cost: to compile, to follow, and to hold in memory.

llguidance counts its own work (``parser_limits``), so the same grammar meets the same limit on any
machine. Processor time and memory are limited besides, because those counts do not see everything.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

# --- of one trial, in a process of its own ---
COMPILE_S = 1.0  # processor time, the first mask included
COMPILE_BYTES = 2**27  # of memory beyond what the tokenizer takes
MAX_TRIALS = 4  # at once
WALK_TOKENS = 48  # of each answer that a trial makes up
WALK_S = 0.25  # processor time after which a trial makes up no further token

# --- of one mask, which is computed outside of the steps ---
MAX_MASK_S = 0.5  # processor time
SLOW_MASK_S = 0.005  # a mask that takes longer is slow
MAX_SLOW_MASKS = 3  # of one request, before its masks are computed at low priority

NICE = 10  # of trials, of compiling, and of slow masks


def parser_limits() -> "LLParserLimits":
    """Limits on the work of one mask (about 50 ms) and on what a matcher holds (about 15 MB)."""
    from llguidance import LLParserLimits  # loads only where a grammar needs it

    return LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )
