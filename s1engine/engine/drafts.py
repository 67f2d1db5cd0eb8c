"""Which requests may be drafted for; how it is done is up to the scheduler (csrc/core)."""

from s1engine import _core
from s1engine.sampling_params import SamplingParams


def drafting(params: SamplingParams) -> _core.Drafting:
    """When the tokens of a request may be drafted, given how they are sampled.

    Penalties count the tokens before, at which a draft only guesses, and log-probabilities come one
    row a step, so these requests go on token by token. A grammar limits the answer alone.
    """
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    if penalties != (1, 0, 0) or params.logprobs is not None:
        return _core.Drafting.NEVER
    return _core.Drafting.ALWAYS if params.grammar is None else _core.Drafting.THINKING
