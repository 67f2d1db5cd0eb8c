"""A model without weights on a KV cache without tensors, driven by the real scheduler.

The cache holds the token and the position that were written to each slot. A row's context is read
back through its block table, so a wrong block, slot, position or length gives a wrong prefix. The
"model" is any function of that prefix.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from s1engine import _core
from s1engine.runner.thinking_ends import ThinkingEnds
from tests.core.reference import Model

VOCAB = 16
EOS = 1
UNSEEN = -1


def hashed_model(seed: int, favourites: Iterable[int] = ()) -> Model:
    """Ranks tokens by a hash of the whole prefix; every few tokens, favourites come first."""

    def rank(ids: list[int]) -> Sequence[int]:
        digest = hashlib.blake2b(bytes(str((seed, ids)), "ascii"), digest_size=8).digest()
        rng = random.Random(digest)
        order = rng.sample(range(VOCAB), VOCAB)
        likely = [t for t in favourites if rng.random() < 0.2]
        return likely + [t for t in order if t not in likely]

    return rank


def repeating_model(seed: int, favourites: Iterable[int] = ()) -> Model:
    """Ranks by a hash of the last two tokens, now and then also of the length: its texts repeat
    themselves, but not forever."""
    hashed = hashed_model(seed, favourites)
    return lambda ids: hashed([*ids[-2:], len(ids) if len(ids) % 7 == seed % 7 else 0])


def windowed(model: Model, window: int) -> Model:
    """Ranks by the last ``window`` tokens and their position."""
    return lambda ids: model([UNSEEN] * max(len(ids) - window, 0) + ids[-window:])


class PagedMock:
    """Scheduler, batch buffers and token cache of one engine. ``drafts``: max_draft, max_samples
    and step_costs of the scheduler. With ``max_window`` only a token's window is read from the
    cache: the model sees UNSEEN in place of the tokens before it."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 16,
        enable_prefix_caching: bool = True,
        max_window: int = 0,
        min_reserve: float = 0.05,
        ends: ThinkingEnds | None = None,
        max_blocks: int | None = None,
        **drafts: Any,
    ) -> None:
        self.scheduler = _core.Scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
            max_window=max_window,
            min_reserve=min_reserve,
            **drafts,
        )
        self.block_size = block_size
        self.max_window = max_window
        self.ends = ends or ThinkingEnds()
        self.max_blocks = max_blocks or num_blocks  # of a sequence
        self.null_block = num_blocks
        rows, tokens = max_num_seqs, max_num_batched_tokens
        samples = max(rows, drafts.get("max_samples", 0))
        self.buffers: dict[str, Any] = {
            "input_ids": np.full(tokens, -1, np.int32),
            "positions": np.full(tokens, -1, np.int32),
            "slot_mapping": np.full(tokens, -1, np.int64),
            "cu_seqlens_q": np.full(rows + 1, -1, np.int32),
            "context_lens": np.full(rows, -1, np.int32),
            "block_table": np.full((rows, self.max_blocks), -1, np.int32),
            "sample_tokens": np.full(samples, -1, np.int32),
            "sample_req_indices": np.full(samples, -1, np.int32),
            "sample_positions": np.full(samples, -1, np.int64),
            "sample_banned": np.full(samples, 0, np.uint8),
            "scored_tokens": np.full(tokens, -1, np.int32),
            "scored_targets": np.full(tokens, -1, np.int64),
        }
        self.batch = _core.ScheduledBatch(
            self.buffers,
            max_tokens=tokens,
            max_rows=rows,
            max_blocks=self.max_blocks,
            max_samples=samples,
        )
        slots = (num_blocks + 1) * block_size  # the last block is the null block
        self.cache = np.full((slots, 2), -1, np.int64)  # token, position

    def step(self, model: Model) -> None:
        """One whole step: schedule, write the cache, sample the best allowed token, update."""
        self.scheduler.schedule(self.batch)
        if self.batch.num_rows == 0:
            return
        self.scheduler.update(self.forward(model))

    def forward(self, model: Model) -> np.ndarray:
        """Sampled tokens of the planned step."""
        b, n = self.buffers, self.batch.num_tokens
        self.cache[b["slot_mapping"][:n], 0] = b["input_ids"][:n]
        self.cache[b["slot_mapping"][:n], 1] = b["positions"][:n]
        row_of = np.searchsorted(
            b["cu_seqlens_q"][1 : self.batch.num_rows + 1], np.arange(n), "right"
        )
        sampled = []
        for token in range(n):  # a model reads the window of every token
            self.context(b["block_table"][row_of[token]], int(b["positions"][token]) + 1)
        for i in range(self.batch.num_samples):
            token = int(b["sample_tokens"][i])
            table = b["block_table"][row_of[token]]
            context = self.context(table, int(b["positions"][token]) + 1)
            assert len(context) == b["sample_positions"][i]
            sampled.append(self.best_allowed(model(context), int(b["sample_banned"][i])))
        return np.array(sampled, np.int64)

    def best_allowed(self, ranked: Sequence[int], code: int) -> int:
        """The first of ``ranked`` tokens that a ban code allows."""
        banned = self.ends.ids(code) if code else ()
        return next(t for t in ranked if t not in banned)

    def context(self, table: np.ndarray, length: int) -> list[int]:
        """The first ``length`` tokens of a row, read through its block table; positions must be 0,
        1, 2, ..."""
        first = max(length - self.max_window, 0) if self.max_window else 0
        index = np.arange(first, length)
        cached = self.cache[
            table[index // self.block_size] * self.block_size + index % self.block_size
        ]
        assert (cached[:, 1] == index).all(), "positions in the cache"
        return [UNSEEN] * first + [int(t) for t in cached[:, 0]]

    def run_to_end(self, model: Model, max_steps: int = 10_000) -> None:
        """Steps until every sequence ended, checking all invariants after each step."""
        while self.scheduler.has_unfinished():
            max_steps -= 1
            assert max_steps > 0, "the scheduler does not finish"
            self.step(model)
            self.scheduler.check_integrity()
