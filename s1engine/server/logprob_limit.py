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
    count = sum(
        request.params.n * (request.max_len - len(request.prompt)) * (1 + request.params.logprobs)
        for request in requests
        if request.params.logprobs is not None
    )
    if count > MAX_LOGPROBS_OF_REQUEST:
        raise RequestError(
            f"logprobs: prompts x n x max_tokens x (1 + alternatives) is {count}; at most "
            f"{MAX_LOGPROBS_OF_REQUEST} log-probabilities fit in an answer: lower max_tokens, n or "
            "the number of alternatives",
            param="logprobs",
        )
    lease.reserve(count * LOGPROB_BYTES)
