"""Scores of prompt tokens: log-probabilities of the tokens that a step's prompts already hold.

Computed from the hidden states of the step in chunks of rows, so that the logits of a long prompt
are never in memory together. Knows no sequences.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s1engine.models.interface import CausalLM
from s1engine.runner.input_batch import ScoredRows

MAX_SCORED_LOGITS = 2**22
"""Logits, float32, that a step computes at a time to score prompt tokens: 16 MiB, and a few times
that while they are sorted."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Of the n scored tokens of one step, in the order of ``ScheduledBatch.scored_spans``."""

    logprobs: np.ndarray  # [n] float32
    ranks: np.ndarray  # [n] int32, 1 for the likeliest token
    top: np.ndarray  # [n, k] float32, descending
    top_ids: np.ndarray  # [n, k] int32


def score_prompts(
    model: CausalLM, hidden: Tensor, rows: ScoredRows, vocab_limit: int, k: int
) -> PromptScores:
    """Scores of the ``rows`` of ``hidden`` [T, H], with the ``k`` likeliest tokens of each. All
    ranks that share a model call this; the result of rank 0 counts."""
    size = max(MAX_SCORED_LOGITS // model.config.vocab_size, 1)  # the same on all ranks
    parts = []
    chunks = zip(torch.split(rows.tokens, size), torch.split(rows.targets, size), strict=True)
    for tokens, targets in chunks:
        logits = model.logits(model.ops.gather_rows(hidden, tokens), vocab_limit)
        width = min(k, logits.shape[1])
        parts.append([t.cpu().numpy() for t in model.ops.score_rows(logits, targets, width)])
    return PromptScores(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
