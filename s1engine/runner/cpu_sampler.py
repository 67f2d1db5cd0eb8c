"""The sampler of the CPU: one native call a step (csrc/cpu/sampler.hpp).

The twin of ``tensor_sampler``. A rule costs what it names: the ids of a bias, the distinct tokens
that occurred for penalties. The native part reads the parameter arrays of ``Sampler`` in place.
"""

import numpy as np
from torch import Tensor

from s1engine._core import cpu
from s1engine.ops.layouts import row_stride
from s1engine.runner.input_batch import SampleRows
from s1engine.runner.interface import NewRequest
from s1engine.runner.sampler import Sampler
from s1engine.runner.thinking_ends import ThinkingEnds
from s1engine.sampling_params import NO_PENALTIES

_COLUMNS = ("temperature", "top_k", "top_p", "min_p", "seeds", "penalties", "num_logprobs")


class CpuSampler(Sampler):
    """Sampling state in native memory.

    Attributes:
        core: the native sampler, which samples without Python.
        needs_python: by req_index, uint8: 1 for sequences that ``core`` alone does not sample.
    """

    def __init__(self, max_num_seqs: int, *, vocab_size: int, ends: ThinkingEnds) -> None:
        super().__init__(max_num_seqs)
        self.needs_python = np.zeros(max_num_seqs, np.uint8)
        self.core = cpu.Sampler(
            {name: getattr(self, name) for name in _COLUMNS},
            vocab_size=vocab_size,
            banned_ids=[ends.ids(code).tolist() for code in ends.codes],
        )

    def _add_rules(self, request: NewRequest) -> None:
        params = request.params
        self.needs_python[request.req_index] = bool(params.logits_processors)
        tokens = [] if params.penalties == NO_PENALTIES else request.token_ids
        bias = list(params.logit_bias.items())
        self.core.add_row(request.req_index, bias, tokens, request.prompt_len, list(request.ends))

    def _count_appended(self, req_indices: np.ndarray, tokens: np.ndarray) -> None:
        self.core.count_appended(req_indices, tokens)

    def _sample(
        self,
        logits: Tensor,
        raw: Tensor,
        rows: SampleRows,
        banned: np.ndarray | None,
        allowed_tokens: dict[int, np.ndarray],
    ) -> tuple[np.ndarray, bytes]:
        stride, req_indices = row_stride(logits), rows.req_indices
        assert raw.stride() == logits.stride()
        positions = rows.positions.data_ptr()
        addresses = logits.data_ptr(), raw.data_ptr()
        return self.core.sample(*addresses, stride, req_indices, positions, banned, allowed_tokens)
