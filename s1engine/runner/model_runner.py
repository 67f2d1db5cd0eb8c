"""One step on the device: forward pass, logits of the rows that sample, sampling.

Owns the weights, the KV cache, the batch buffers and the sampling state. Knows nothing of requests:
it computes what the ScheduledBatch says and returns one token a sampling row. Steps that only
decode may go to its CudaGraphRunner, a run at a time.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from s1engine.config import EngineConfig
from s1engine.models.config import ModelConfig
from s1engine.models.decoder import Decoder
from s1engine.models.loader import load_decoder
from s1engine.ops import AttentionMetadata, RunState, select_ops
from s1engine.ops.cpu_ops import CpuOps
from s1engine.runner.cpu_plans import CpuPlans
from s1engine.runner.cuda_graph import CudaGraphRunner
from s1engine.runner.device import resolve_cache_dtype, resolve_dtype
from s1engine.runner.input_batch import InputBatch, StepInputs
from s1engine.runner.kv_cache import KVCache
from s1engine.runner.lanes import RunFormat
from s1engine.runner.memory import check_weights_fit, plan_memory
from s1engine.runner.sampler import Sampler, SamplerOutput


class Runner(Protocol):
    """What an engine needs of a runner: memory for sequences, and steps."""

    batch: InputBatch
    sampler: Sampler
    max_model_len: int
    num_blocks: int
    ahead: CudaGraphRunner | None  # None: the host decides every step

    def execute(self) -> SamplerOutput:
        """Computes the step that stands in ``batch``."""


class ModelRunner:
    """A loaded model with memory for its sequences.

    Args:
        config: resolved for the device (``device.resolve_config``).
        model_config: the architecture, from the model directory.
        path: that directory, or a decoder that is in memory already.
        vocab_limit: number of token ids that may be sampled.
        triggers: ids that end thinking, banned where the scheduler says so.
        newlines: [V] uint8, does the token's text end in a newline?
        progress: show a bar while weights load and graphs are captured.

    Raises:
        RequestError: the memory does not suffice, or an operation does not cover the model.
        ModelError: the weights are damaged, or a graph cannot be captured.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        path: Path | Decoder,
        *,
        vocab_limit: int,
        triggers: tuple[int, ...],
        newlines: np.ndarray,
        progress: bool,
    ) -> None:
        assert config.block_size is not None and config.run_ahead is not None
        self.device, block_size = config.device, config.block_size
        self.dtype = resolve_dtype(config.dtype, self.device, model_config.torch_dtype)
        cache_dtype = resolve_cache_dtype(config.kv_cache_dtype, self.dtype)
        self.ops = path.ops if isinstance(path, Decoder) else select_ops(self.device)
        self.ops.check_model(
            head_dim=model_config.head_dim,
            num_heads=model_config.num_heads,
            num_kv_heads=model_config.num_kv_heads,
            block_size=block_size,
            dtype=self.dtype,
            cache_dtype=cache_dtype,
            quantization=config.quantization,
        )
        self._vocab_limit = vocab_limit
        if isinstance(path, Decoder):
            self._decoder = path
        else:
            check_weights_fit(model_config, self.dtype, self.device, config.quantization)
            self._decoder = load_decoder(
                path,
                model_config,
                self.dtype,
                self.device,
                self.ops,
                progress=progress,
                quantization=config.quantization,
            )
        self.max_model_len, self.num_blocks = plan_memory(
            config, model_config, cache_dtype, self._activation_bytes(config)
        )
        self.kv_cache = KVCache(
            model_config,
            num_blocks=self.num_blocks + 1,  # the last is scratch: lanes that have finished write
            block_size=block_size,
            dtype=cache_dtype,
            device=self.device,
        )
        self.batch = InputBatch(
            max_tokens=config.max_num_batched_tokens,
            max_rows=config.max_num_seqs,
            max_blocks=-(-self.max_model_len // block_size),
            device=self.device,
        )
        self.sampler = Sampler(
            max_num_seqs=config.max_num_seqs,
            vocab_size=vocab_limit,
            triggers=triggers,
            ops=self.ops,
            device=self.device,
        )
        self._starts = torch.arange(
            config.max_num_seqs + 1, dtype=torch.int32, device=self.device
        )  # cu_seqlens_q of a decode step
        self._plans = CpuPlans(self.ops) if isinstance(self.ops, CpuOps) else None
        fmt = RunFormat(triggers, newlines, block_size, self.num_blocks * block_size)
        self.ahead = self._make_ahead(config, fmt, progress) if config.run_ahead > 1 else None

    def _make_ahead(self, config: EngineConfig, fmt: RunFormat, progress: bool) -> CudaGraphRunner:
        assert config.run_ahead is not None
        ahead = CudaGraphRunner(
            self.decode_step,
            max_steps=config.run_ahead,
            max_num_seqs=config.max_num_seqs,
            block_table=self.batch.block_table,
            fmt=fmt,
            device=self.device,
        )
        if self.device == "cuda" and not config.enforce_eager:
            with torch.inference_mode():
                ahead.capture(progress=progress)
        return ahead

    @torch.inference_mode()
    def execute(self) -> SamplerOutput:
        """Computes the step that stands in ``batch``."""
        inputs = self.batch.inputs()
        logits = (
            self._logits(inputs) if self._plans is None else self._plans.run(inputs, self._logits)
        )
        return self.sampler.sample(logits, inputs.rows, self.batch.core.num_banned > 0)

    def _logits(self, inputs: StepInputs) -> torch.Tensor:
        hidden = self._decoder.forward(inputs.input_ids, self.kv_cache.layers, inputs.attention)
        rows = self.ops.take_rows(hidden, inputs.sample_tokens)
        return self._decoder.logits(rows, self._vocab_limit)

    @torch.inference_mode()
    def decode_step(self, run: RunState, filtered: bool) -> None:
        """One token for every lane of a run; reads and writes its buffers alone, waits for
        nothing, and launches the same kernels each time."""
        meta = AttentionMetadata(
            positions=run.lane("positions"),
            slot_mapping=run.slot_mapping,
            cu_seqlens_q=self._starts[: len(run.slot_mapping) + 1],
            context_lens=run.lane("context_lens"),
            block_table=run.block_table,
            max_seqlen_q=1,
        )
        hidden = self._decoder.forward(run.lane("input_ids"), self.kv_cache.layers, meta)
        self._decoder.decide(hidden, self._vocab_limit, run, filtered=filtered)

    def _activation_bytes(self, config: EngineConfig) -> int:
        """What the largest step allocates beside weights and cache, measured by taking it once."""
        if self.device != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logits = largest_step(self._decoder, config, self._vocab_limit)
        peak = torch.cuda.max_memory_allocated() - before
        return peak + 2 * logits.nbytes  # filters and log-probabilities keep copies


@torch.inference_mode()
def largest_step(decoder: Decoder, config: EngineConfig, vocab_limit: int) -> torch.Tensor:
    """A step of ``max_num_batched_tokens`` tokens of one sequence, over a cache of one block, and
    logits of ``max_num_seqs`` rows, which are returned."""
    assert config.block_size is not None
    tokens, device = config.max_num_batched_tokens, decoder.device

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    cache = KVCache(
        decoder.config,
        num_blocks=1,
        block_size=config.block_size,
        dtype=resolve_cache_dtype(config.kv_cache_dtype, decoder.dtype),
        device=str(device),
    )
    meta = AttentionMetadata(
        positions=zeros(tokens),
        slot_mapping=zeros(tokens, dtype=torch.int64),
        cu_seqlens_q=torch.tensor([0, tokens], dtype=torch.int32, device=device),
        context_lens=torch.tensor([tokens], dtype=torch.int32, device=device),
        block_table=zeros(1, -(-tokens // config.block_size) + 1),
        max_seqlen_q=tokens,
    )
    hidden = decoder.forward(zeros(tokens), cache.layers, meta)
    rows = hidden[:1].expand(config.max_num_seqs, -1).contiguous()
    return decoder.logits(rows, vocab_limit)
