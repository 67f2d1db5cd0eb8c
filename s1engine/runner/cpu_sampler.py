"""The sampler of the CPU: one native call a step (csrc/cpu/sampler.hpp).

The twin of ``tensor_sampler``. A rule costs what it names: the ids of a bias, the distinct tokens
that occurred for penalties. The native part reads the parameter arrays of ``Sampler`` in place.
"""

import numpy as np
import torch
from torch import Tensor

from s1engine._core import cpu
from s1engine.ops.cpu_ops import CpuOps
from s1engine.ops.layouts import row_stride
from s1engine.outputs import RowLogprobs
from s1engine.runner.input_batch import SampleRows
from s1engine.runner.interface import NewRequest
from s1engine.runner.sampler import NO_MASKS, Sampler, row_logprobs
from s1engine.runner.thinking_ends import ThinkingEnds
from s1engine.sampling_params import NO_PENALTIES


class CpuSampler(Sampler):
    """Sampling state in native memory.

    Attributes:
        core: the native sampler, which samples without Python.
    """

    def __init__(
        self, max_num_seqs: int, *, vocab_size: int, ends: ThinkingEnds, ops: CpuOps
    ) -> None:
        super().__init__(max_num_seqs)
        self._ops = ops
        columns = ("temperature", "top_k", "top_p", "min_p", "seeds", "penalties")
        self.core = cpu.Sampler(
            {name: getattr(self, name) for name in columns},
            vocab_size=vocab_size,
            banned_ids=[ends.ids(code).tolist() for code in ends.codes],
        )

    def _add_rules(self, request: NewRequest) -> None:
        params = request.params
        tokens = [] if params.penalties == NO_PENALTIES else request.token_ids
        bias = list(params.logit_bias.items())
        self.core.add_row(request.req_index, bias, tokens, request.prompt_len)

    def _count_appended(self, req_indices: np.ndarray, tokens: np.ndarray) -> None:
        self.core.count_appended(req_indices, tokens)

    def sample(
        self,
        logits: Tensor,
        rows: SampleRows,
        *,
        any_banned: bool,
        allowed_tokens: dict[int, np.ndarray] = NO_MASKS,
    ) -> tuple[np.ndarray, dict[int, RowLogprobs]]:
        """See Sampler."""
        wanted = self.num_logprobs[rows.req_indices]
        raw = logits.clone() if wanted.max(initial=-1) >= 0 else None
        ids = self.core.sample(
            logits.data_ptr(),
            row_stride(logits),
            rows.req_indices,
            rows.positions.data_ptr(),
            rows.banned if any_banned else None,
            allowed_tokens,
        )
        if raw is None:
            return ids, {}
        return ids, row_logprobs(self._ops, raw, torch.from_numpy(ids), rows.req_indices, wanted)
