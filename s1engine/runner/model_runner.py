"""One step on the device: forward pass, logits of the rows that sample, sampling.

Owns the weights, the KV cache, the batch buffers and the sampling state. Knows nothing of requests:
it computes what the ScheduledBatch says and returns one token a sampling row. Steps that only
decode may go to its CudaGraphRunner, a run at a time. If several ranks share the model each has one
of these, and the first rank's samples.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from s1engine.config import EngineConfig
from s1engine.models.checkpoint import Checkpoint
from s1engine.models.collective import SharedCollective
from s1engine.models.decoder import Decoder
from s1engine.models.loader import load_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.models.shard import UNSHARDED, check
from s1engine.ops import AttentionMetadata, DeviceBatchTensors, select_ops
from s1engine.ops.cpu_ops import CpuOps
from s1engine.runner.cpu_graph import CpuGraphRunner
from s1engine.runner.cuda_graph import CudaGraphRunner
from s1engine.runner.device_batch import DeviceBatchFormat
from s1engine.runner.input_batch import InputBatch, StepInputs
from s1engine.runner.kernel_warmup import compile_kernels
from s1engine.runner.kv_cache import KVCache
from s1engine.runner.memory import check_weights_fit, plan_memory
from s1engine.runner.resolved_config import resolve_cache_dtype, resolve_dtype
from s1engine.runner.sampler import Sampler, SamplerOutput
from s1engine.runner.step_profile import profile_steps
from s1engine.runner.worker_group import WorkerGroup, Workers


class Runner(Protocol):
    """What an engine needs of a runner: memory for sequences, and steps."""

    batch: InputBatch
    sampler: Sampler
    max_model_len: int
    num_blocks: int
    ahead: CudaGraphRunner | None  # None: the host decides every step

    @property
    def recorded_now(self) -> bool:
        """Was the last step the first of its size, and took longer than others will?"""

    def execute(self) -> SamplerOutput:
        """Computes the step that stands in ``batch``."""

    def check(self) -> None:
        """Raises EngineDeadError if a step could not be computed."""

    def close(self) -> None:
        """Ends processes that belong to it. No step may follow."""

    def profile_step_costs(self) -> list[tuple[int, float]]:
        """What steps take by their tokens, in any unit; points of a line."""


class ModelRunner:
    """A loaded model with memory for its sequences.

    Args:
        config: resolved for the device (``resolve_config``).
        model_config: the architecture, from the model directory.
        path: that directory, or a decoder that is in memory already.
        vocab_limit: number of token ids that may be sampled.
        triggers: ids that end thinking, banned where the scheduler says so.
        newlines: [V] uint8, does the token's text end in a newline?
        progress: show a bar while weights load and graphs are captured.
        workers: on other ranks than the first, where that is. The first starts the others itself.

    Raises:
        EngineDeadError: another rank has died.
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
        workers: Workers | None = None,
    ) -> None:
        check(model_config, config.tensor_parallel_size)
        assert config.block_size is not None and config.run_ahead is not None
        self.device, self._vocab_limit = config.device, vocab_limit
        self._max_samples = config.max_samples
        self._worker_group: WorkerGroup | None = None
        if config.tensor_parallel_size > 1 and workers is None:
            assert isinstance(path, Path), "a model that is in memory already is not shared"
            workers = self._worker_group = WorkerGroup(config, path)
        try:
            self._decoder = self._load(config, model_config, path, workers, progress)
            self._allocate(config, path, workers)
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
            self._cpu_graph = self._make_cpu_graph(workers)
            null_slot = self.num_blocks * config.block_size
            fmt = DeviceBatchFormat(triggers, newlines, config.block_size, null_slot)
            self.multi_step = (
                self._make_ahead(config, fmt, progress) if config.run_ahead > 1 else None
            )
            if self.device == "cuda":
                compile_kernels(
                    self._decoder,
                    self.kv_cache,
                    max_num_seqs=config.max_num_seqs,
                    vocab_limit=vocab_limit,
                    progress=progress,
                )
            if workers is not None:
                workers.ready()
        except BaseException:
            self.close()
            raise

    def _load(
        self,
        config: EngineConfig,
        whole: ModelConfig,
        path: Path | Decoder,
        workers: Workers | None,
        progress: bool,
    ) -> Decoder:
        """The model, or this rank's part of it."""
        own = (UNSHARDED if workers is None else workers.collective.shard).config(whole)
        self.dtype = resolve_dtype(config.dtype, self.device, whole.torch_dtype)
        self._cache_dtype = resolve_cache_dtype(config.kv_cache_dtype, self.dtype)
        self.ops = path.ops if isinstance(path, Decoder) else select_ops(self.device)
        assert config.block_size is not None
        quantization = whole.quantization(config.quantization)
        self.ops.check_model(
            head_dim=own.head_dim,
            num_heads=own.num_heads,
            num_kv_heads=own.num_kv_heads,
            block_size=config.block_size,
            dtype=self.dtype,
            cache_dtype=self._cache_dtype,
            quantization=quantization,
        )
        if isinstance(path, Decoder):
            return path
        check_weights_fit(own, self.dtype, self.device, quantization)
        return load_decoder(
            path,
            whole,
            self.dtype,
            self.device,
            self.ops,
            progress=progress,
            quantization=quantization,
            collective=None if workers is None else workers.collective,
        )

    def _allocate(
        self, config: EngineConfig, path: Path | Decoder, workers: Workers | None
    ) -> None:
        """Memory for sequences and steps, the same number of blocks on all ranks."""
        assert config.block_size is not None
        own = self._decoder.config
        room = plan_memory(config, own, self._cache_dtype, self._activation_bytes(config))
        if workers is not None:
            assert isinstance(path, Path)
            room = workers.sync_kv_capacity(Checkpoint(path).weights_digest(), room)
        self.max_model_len, self.num_blocks = room
        self.kv_cache = KVCache(
            own,
            num_blocks=self.num_blocks + 1,  # the last is scratch: lanes that have finished write
            block_size=config.block_size,
            dtype=self._cache_dtype,
            device=self.device,
        )
        self.batch = InputBatch(
            max_tokens=config.max_num_batched_tokens,
            max_rows=config.max_num_seqs,
            max_blocks=-(-self.max_model_len // config.block_size),
            device=self.device,
            max_samples=config.max_samples,
            share=None if workers is None else workers.share,
        )

    def _make_cpu_graph(self, workers: Workers | None) -> CpuGraphRunner | None:
        if not isinstance(self.ops, CpuOps):
            return None
        collective = None if workers is None else workers.collective
        assert collective is None or isinstance(collective, SharedCollective)
        return CpuGraphRunner(self.ops, *(() if collective is None else (collective.workspace,)))

    def _make_ahead(
        self, config: EngineConfig, fmt: DeviceBatchFormat, progress: bool
    ) -> CudaGraphRunner:
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

    @property
    def recorded_now(self) -> bool:
        """Was the last step the first of its size, and took longer than others will?"""
        return self._cpu_graph is not None and self._cpu_graph.recorded_now

    @torch.inference_mode()
    def execute(self) -> SamplerOutput:
        """Computes the step that stands in ``batch``."""
        if self._worker_group is None:
            return self._execute()
        with self._worker_group.step(self.batch.sizes):
            return self._execute()

    def _execute(self) -> SamplerOutput:
        inputs = self.batch.inputs()
        return self.sampler.sample(
            self._compute(inputs), inputs.rows, self.batch.core.num_banned > 0
        )

    def _compute(self, inputs: StepInputs) -> torch.Tensor:
        """The logits, by a recording if there is one."""
        return (
            self._logits(inputs)
            if self._cpu_graph is None
            else self._cpu_graph.execute(inputs, self._logits)
        )

    @torch.inference_mode()
    def follow(self, sizes: tuple[int, int, int, int]) -> None:
        """This rank's part of a step that the first rank executes."""
        self._compute(self.batch.inputs(sizes))

    def _logits(self, inputs: StepInputs) -> torch.Tensor:
        """float32 [rows that sample, vocab_limit]; on other ranks than the first, a part."""
        hidden = self._decoder.forward(inputs.input_ids, self.kv_cache.layers, inputs.attention)
        rows = self.ops.gather_rows(hidden, inputs.sample_tokens)
        return self._decoder.logits(rows, self._vocab_limit)

    def check(self) -> None:
        """Raises EngineDeadError if another rank has died."""
        if self._worker_group is not None:
            self._worker_group.check()

    def close(self) -> None:
        """Ends the other ranks, if there are any."""
        if self._worker_group is not None:
            self._worker_group.close()

    def profile_step_costs(self) -> list[tuple[int, float]]:
        """Seconds of steps by their tokens, measured now. Before the first step alone."""
        most = len(self.batch.block_table) * self.max_model_len
        return profile_steps(self._dummy_run, min(self._max_samples, most))

    def _dummy_run(self, tokens: int) -> Callable[[], None]:
        """A step that samples at every token, as such steps are taken, over the null block."""
        sizes = self.batch.fill_dummy(tokens, self.num_blocks, self.kv_cache.block_size)

        @torch.inference_mode()
        def step() -> None:
            inputs = self.batch.inputs(sizes)
            self.sampler.sample(self._compute(inputs), inputs.rows, any_banned=False)

        return step

    @torch.inference_mode()
    def decode_step(self, run: DeviceBatchTensors, filtered: bool) -> None:
        """One token for every lane of a run; reads and writes its buffers alone, waits for
        nothing, and launches the same kernels each time."""
        meta = AttentionMetadata(
            positions=run.field("positions"),
            slot_mapping=run.slot_mapping,
            cu_seqlens_q=self._starts[: len(run.slot_mapping) + 1],
            context_lens=run.field("context_lens"),
            block_table=run.block_table,
            max_seqlen_q=1,
        )
        hidden = self._decoder.forward(run.field("input_ids"), self.kv_cache.layers, meta)
        self._decoder.sample_and_advance(hidden, self._vocab_limit, run, filtered=filtered)

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
    logits of ``max_samples`` rows, which are returned."""
    assert config.block_size is not None
    tokens, device = config.max_num_batched_tokens, decoder.device

    cache = KVCache(
        decoder.config,
        num_blocks=1,
        block_size=config.block_size,
        dtype=resolve_cache_dtype(config.kv_cache_dtype, decoder.dtype),
        device=str(device),
    )
    meta = _one_sequence(tokens, config.block_size, 0, device)
    hidden = decoder.forward(meta.positions, cache.layers, meta)
    rows = hidden[:1].expand(config.max_samples, -1).contiguous()
    return decoder.logits(rows, vocab_limit)


def _one_sequence(
    tokens: int, block_size: int, block: int, device: str | torch.device
) -> AttentionMetadata:
    """A step of one sequence's first ``tokens`` tokens, all of whose blocks are ``block``, and all
    of whose positions are 0: what it costs does not depend on them."""
    at = torch.arange(tokens, device=device)
    blocks = -(-tokens // block_size)
    return AttentionMetadata(
        positions=torch.zeros(tokens, dtype=torch.int32, device=device),
        slot_mapping=block * block_size + at % block_size,
        cu_seqlens_q=torch.tensor([0, tokens], dtype=torch.int32, device=device),
        context_lens=torch.tensor([tokens], dtype=torch.int32, device=device),
        block_table=torch.full((1, blocks), block, dtype=torch.int32, device=device),
        max_seqlen_q=tokens,
    )
