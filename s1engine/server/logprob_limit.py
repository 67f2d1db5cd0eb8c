"""The memory of log-probabilities, reserved before the first token.

It may be hundreds of times that of the text, and a request that fails late has cost its answer."""

from collections.abc import Sequence

from s1engine.engine.request import Request
from s1engine.errors import RequestError
from s1engine.server.buffer_budget import BufferLease

MAX_LOGPROBS_OF_REQUEST = 2**22  # of tokens and their alternatives
LOGPROB_BYTES = 136  # of one: a tuple, an id, a float and their places in the answer


def reserve_logprobs(requests: Sequence[Request], lease: BufferLease) -> None:
    """Reserve what the log-probabilities of one HTTP request may need until they are sent.

    Raises RequestError if they are more than MAX_LOGPROBS_OF_REQUEST, NotAdmitted if other requests
    need the memory.
    """
    count = sum(map(_count, requests))
    if count > MAX_LOGPROBS_OF_REQUEST:
        raise RequestError(
            f"logprobs: prompts x (n x max_tokens + tokens of a prompt) x (1 + alternatives) is "
            f"{count}; at most {MAX_LOGPROBS_OF_REQUEST} log-probabilities fit in an answer: lower "
            "max_tokens, n or the number of alternatives, or send fewer prompts",
            param="prompt_logprobs"
            if all(r.params.logprobs is None for r in requests)
            else "logprobs",
        )
    lease.reserve(count * LOGPROB_BYTES)


def _count(request: Request) -> int:
    """Log-probabilities of one prompt and of its samples."""
    params, count = request.params, 0
    if params.logprobs is not None:
        count += params.n * (request.max_len - len(request.prompt)) * (1 + params.logprobs)
    if params.prompt_logprobs is not None:  # an echo has them in each choice
        count += params.n * request.num_given * (1 + params.prompt_logprobs)
    return count
