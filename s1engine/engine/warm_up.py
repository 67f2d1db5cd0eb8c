"""What the first requests of an engine would load, record or compile, done before they come."""

import contextlib

from s1engine.checks import check_int
from s1engine.engine.embedded import EmbeddedEngine
from s1engine.errors import RequestError
from s1engine.sampling_params import SamplingParams

WARM_SEQS = 8  # decoding at a time, by default
MAX_WARM_SEQS = 1024


def warm_up(owner: EmbeddedEngine, num_seqs: object) -> None:
    """Prepares steps that decode up to ``num_seqs`` sequences; see ``LLM.warmup``."""
    rows = check_int("num_seqs", num_seqs, 1, MAX_WARM_SEQS)
    with contextlib.suppress(RequestError):  # a model without chat template
        owner.compiler.compile([{"role": "user", "content": "a"}], SamplingParams(max_tokens=1))
    owner.thread.call(lambda engine: engine.runner.warm_up(rows))
