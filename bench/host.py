"""Host work of one decode step: LLMEngine.step without the forward pass and sampling.

The runner here has no model. It has real buffers, creates every tensor view and gathers the
sampling state as the real one does, and returns a constant token. So the time is that of
scheduling, batch writing, budgets, bookkeeping and outputs.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s1engine import _core
from s1engine.config import EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.ops import SamplingMetadata
from s1engine.ops.torch_ops import TorchOps
from s1engine.runner.decode_loop import DecodeLoop
from s1engine.runner.device_batch import DeviceBatchBuffer
from s1engine.runner.input_batch import InputBatch
from s1engine.runner.interface import ModelRunnerOutput, SchedulerOutput
from s1engine.runner.kv_cache import KVCache
from s1engine.runner.tensor_sampler import TensorSampler
from s1engine.runner.thinking_ends import ThinkingEnds
from s1engine.sampling_params import SamplingParams, ThinkingBudget

BLOCK_SIZE = 16


class ConstantOps(TorchOps):
    """Samples a constant token at no cost."""

    def __init__(self, rows: int, token: int) -> None:
        self._tokens = torch.full((rows,), token)

    def sample(self, logits: Tensor, meta: SamplingMetadata) -> Tensor:
        return self._tokens[: len(logits)]


class HostRunner:
    """The Runner protocol without weights."""

    dtype = torch.float32
    kv_cache: KVCache  # there is none, and no session to save

    def __init__(self, *, num_seqs: int, context: int, steps: int, token: int) -> None:
        self.max_model_len = context + steps + 4 * BLOCK_SIZE
        blocks = -(-self.max_model_len // BLOCK_SIZE)
        self.num_blocks = blocks * (num_seqs + 1)
        self.batch = InputBatch(
            max_tokens=num_seqs * context, max_rows=num_seqs, max_blocks=blocks, device="cpu"
        )
        self.sampler = TensorSampler(
            num_seqs,
            vocab_size=8,
            ends=ThinkingEnds((0,)),
            ops=ConstantOps(num_seqs, token),
            device="cpu",
        )
        self.max_window = 0
        self.max_steps = 1
        self.decode_loop: DecodeLoop | None = None
        self._logits = torch.zeros(num_seqs, 8)

    def next_batch(self) -> _core.ScheduledBatch:
        """Nothing is copied."""
        return self.batch.core

    def profile_step_costs(self) -> list[tuple[int, float]]:
        """None: drafts are not measured here."""
        return []

    def warm_up(self, num_rows: int) -> None:
        """Nothing is recorded."""

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """ModelRunner.execute without the model."""
        self.sampler.update_states(step)
        rows = self.batch.inputs().rows
        sampled = self.sampler.sample(
            self._logits[: len(rows.req_indices)],
            rows,
            any_banned=self.batch.core.num_banned > 0,
            allowed_tokens=step.allowed_tokens,
        )
        return ModelRunnerOutput(sampled.token_ids, sampled.logprobs)

    def device_batch(self, num_rows: int) -> DeviceBatchBuffer | None:
        """None: there is no device to decode several steps."""
        return None

    def begin_multi_step(self, step: SchedulerOutput) -> None:
        """Never called, as are the two that follow."""
        raise NotImplementedError

    def extend_multi_step(self, num_steps: int) -> None:
        raise NotImplementedError

    def collect(self) -> ModelRunnerOutput:
        raise NotImplementedError

    def abandon_step(self) -> None:
        """See Runner."""

    def check_health(self) -> None:
        """It cannot die."""

    def close(self) -> None:
        """Nothing to stop."""


def measure(num_seqs: int, context: int, steps: int, *, thinking: bool, stream: bool) -> float:
    """Median microseconds of a decode step."""
    runner = HostRunner(num_seqs=num_seqs, context=context, steps=steps, token=5)
    config = EngineConfig(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs * context,
        block_size=BLOCK_SIZE,
        enable_prefix_caching=True,
    )
    engine = LLMEngine(config, runner=runner)
    budget = ThinkingBudget(num_waits=2, answer_reserve=1) if thinking else None
    params = SamplingParams(temperature=0, ignore_eos=True, thinking=budget)
    rng = np.random.default_rng(0)
    for _ in range(num_seqs):
        prompt = rng.integers(3, 50, context).tolist()
        engine.add_request(engine.make_request(prompt, params, stream=stream))
    engine.step()  # all prompts at once
    engine.step()
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin)
    assert runner.batch.core.num_rows == runner.batch.core.num_tokens == num_seqs
    return statistics.median(times) * 1e6


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all variants in one process."""
    variants = {
        "step_us": {"thinking": True, "stream": False},
        "step_without_budgets_us": {"thinking": False, "stream": False},
        "step_streaming_us": {"thinking": True, "stream": True},
    }
    result: dict[str, Any] = {"num_seqs": args.num_seqs, "context": args.context}
    for name, variant in variants.items():
        result[name] = round(measure(args.num_seqs, args.context, args.steps, **variant), 1)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench host``."""
    parser.add_argument("--num-seqs", type=int, default=256, help="running sequences")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each")
    parser.add_argument("--steps", type=int, default=500, help="steps to time")
