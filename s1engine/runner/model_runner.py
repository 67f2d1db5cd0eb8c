"""One step on the device: forward pass, logits of the rows that sample, sampling.

Owns the weights, the KV cache, the batch buffers and the sampling state. Knows nothing of requests:
it computes the step that the scheduler has written and returns one token for each sampling row.
Decode steps may go to its CudaGraphRunner, several a launch. If several processes share the model,
each has a ModelRunner that follows the commands of rank 0: rank 0 samples single steps, and all
ranks take the steps of a multi-step decode alike.
"""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from s1engine import _core
from s1engine.models.checkpoint import open_weights
from s1engine.models.collective import SharedCollective
from s1engine.models.decoder import Decoder
from s1engine.models.interface import CausalLM
from s1engine.models.model_config import ModelConfig
from s1engine.models.model_facts import ModelFacts
from s1engine.models.shard import check_tensor_parallel
from s1engine.ops import AttentionMetadata, DeviceBatchTensors, Ops, select_ops
from s1engine.ops.cpu_ops import CpuOps
from s1engine.profiling import profiler_attached, ranged
from s1engine.runner.cpu_graph import CpuGraphRunner
from s1engine.runner.cpu_sampler import CpuSampler
from s1engine.runner.cuda_graph import CudaGraphRunner
from s1engine.runner.decode_loop import DecodeLoop
from s1engine.runner.device_batch import DeviceBatchBuffer, DeviceBatchFormat
from s1engine.runner.dummy_batch import dummy_attention_metadata, even_query_lens
from s1engine.runner.input_batch import InputBatch, StepInputs, StepSizes
from s1engine.runner.interface import ModelRunnerOutput, SchedulerOutput
from s1engine.runner.kernel_warmup import compile_kernels
from s1engine.runner.kv_cache import KVCache
from s1engine.runner.load_model import load_model
from s1engine.runner.memory import plan_memory, return_free_memory
from s1engine.runner.prompt_scores import PromptScores, score_prompts
from s1engine.runner.rank_commands import CommandKind, RankCommand
from s1engine.runner.resolved_config import (
    ResolvedConfig,
    rank_threads,
    resolve_cache_dtype,
    resolve_dtype,
)
from s1engine.runner.sampler import Sampler
from s1engine.runner.step_graph import StepGraphRunner, cuda_capture
from s1engine.runner.step_profile import profile_steps
from s1engine.runner.tensor_sampler import TensorSampler
from s1engine.runner.thinking_ends import ThinkingEnds
from s1engine.runner.worker_group import WorkerGroup, Workers

logger = logging.getLogger(__name__)


class ModelRunner:
    """A loaded model with memory for its sequences: the ``Runner`` of an engine, or of a worker.

    Args:
        model_config: the architecture, from the model directory.
        path: that directory, or a model that is in memory already.
        vocab_limit: number of token ids that may be sampled.
        ends: what ends thinking, banned where the scheduler says so.
        newlines: [V] uint8, does the token's text end in a newline?
        progress: show a bar while weights load and graphs are captured.
        workers: on a worker, its connection to rank 0. Rank 0 starts the workers itself.

    Raises:
        EngineDeadError: another rank has died.
        RequestError: the memory does not suffice, or an operation does not cover the model.
        ModelError: the weights are damaged, or a graph cannot be captured.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        model_config: ModelFacts,
        path: Path | CausalLM,
        *,
        vocab_limit: int,
        ends: ThinkingEnds,
        newlines: np.ndarray,
        progress: bool,
        workers: Workers | None = None,
    ) -> None:
        check_tensor_parallel(model_config, config.tensor_parallel_size)
        self.device, self._vocab_limit = config.device, vocab_limit
        self.max_steps = config.run_ahead if isinstance(model_config, ModelConfig) else 1
        self._max_samples = config.max_samples
        self._owns_ops = isinstance(path, Path)
        self._worker_group: WorkerGroup | None = None
        if config.tensor_parallel_size > 1 and workers is None:
            assert isinstance(path, Path), "a model that is in memory already is not shared"
            workers = self._worker_group = WorkerGroup(
                config, path, vocab_limit=vocab_limit, ends=ends, newlines=newlines
            )
        try:
            self.dtype = resolve_dtype(config.dtype, self.device, model_config.torch_dtype)
            self._cache_dtype = resolve_cache_dtype(config.kv_cache_dtype, self.dtype)
            if isinstance(path, Path):
                self.ops = select_ops(self.device, rank_threads(config))
            else:
                self.ops = path.ops
            self._decoder = load_model(
                config,
                model_config,
                path,
                self.ops,
                dtype=self.dtype,
                cache_dtype=self._cache_dtype,
                collective=None if workers is None else workers.collective,
                progress=progress,
            )
            if self.device == "cpu":
                return_free_memory()  # of tensors that were read and packed
            self._allocate(config, path, workers)
            self.sampler = make_sampler(
                self.ops,
                config.max_num_seqs,
                vocab_size=vocab_limit,
                ends=ends,
                device=self.device,
                max_samples=config.max_samples,
            )
            self._ranged_sample = ranged("sample", self.sampler.sample)
            self._decode_starts = torch.arange(
                config.max_num_seqs + 1, dtype=torch.int32, device=self.device
            )  # cu_seqlens_q of a decode step
            self._cpu_graph = self._make_cpu_graph(config, workers)
            self.decode_loop = self._make_decode_loop()
            null_slot = self.num_blocks * config.block_size
            fmt = DeviceBatchFormat(ends, newlines, config.block_size, null_slot)
            self.multi_step = self._make_multi_step(config, fmt, progress)
            self._shared_rows: torch.Tensor | None = None  # of a multi-step decode, for all ranks
            if workers is not None and self.multi_step is not None:
                self._shared_rows = workers.allocate(self.multi_step.largest.num_bytes)
            if self.device == "cuda":
                compile_kernels(
                    self._decoder,
                    self.kv_cache,
                    max_num_seqs=config.max_num_seqs,
                    vocab_limit=vocab_limit,
                    progress=progress,
                )
            self._step_graphs = self._make_step_graphs(config, workers, null_slot, progress)
            if workers is not None:
                workers.wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _allocate(
        self, config: ResolvedConfig, path: Path | CausalLM, workers: Workers | None
    ) -> None:
        """Memory for sequences and steps, the same number of blocks on all ranks."""
        own = self._decoder.config
        capacity = plan_memory(config, own, self._cache_dtype, self._activation_bytes(config))
        if workers is not None:
            assert isinstance(path, Path)
            capacity = workers.sync_kv_capacity(open_weights(path).weights_digest(), capacity)
        self.max_model_len, self.num_blocks = capacity
        self.max_window = own.max_window
        self.kv_cache = KVCache(
            own,
            num_blocks=self.num_blocks + 1,  # the last is the null block: finished rows write there
            block_size=config.block_size,
            dtype=self._cache_dtype,
            device=self.device,
        )
        logger.info("KV cache: %s", self.kv_cache.summary())
        self.batch = InputBatch(
            max_tokens=config.max_num_batched_tokens,
            max_rows=config.max_num_seqs,
            max_blocks=-(-self.max_model_len // config.block_size),
            device=self.device,
            max_samples=config.max_samples,
            allocate=None if workers is None else workers.allocate,
        )

    def _make_cpu_graph(
        self, config: ResolvedConfig, workers: Workers | None
    ) -> CpuGraphRunner | None:
        native = isinstance(self._decoder, Decoder)
        if config.enforce_eager or not native or not isinstance(self.ops, CpuOps):
            return None
        if workers is None:
            return CpuGraphRunner(self.ops)
        assert isinstance(workers.collective, SharedCollective)
        return CpuGraphRunner(self.ops, workers.collective.workspace)

    def _make_decode_loop(self) -> DecodeLoop | None:
        """None if other ranks, operations of torch or a multi-step decode take part in a step."""
        if self._cpu_graph is None or self._worker_group is not None or self.max_steps > 1:
            return None
        assert isinstance(self.sampler, CpuSampler)
        return DecodeLoop(self.batch, self._cpu_graph, self.sampler.core, self.sampler.needs_python)

    def _make_multi_step(
        self, config: ResolvedConfig, fmt: DeviceBatchFormat, progress: bool
    ) -> CudaGraphRunner | None:
        if self.max_steps == 1:
            return None
        multi_step = CudaGraphRunner(
            self.decode_step,
            max_steps=self.max_steps,
            max_num_seqs=config.max_num_seqs,
            block_table=self.batch.block_table,
            fmt=fmt,
            device=self.device,
        )
        if self.device == "cuda" and not config.enforce_eager:
            with torch.inference_mode():
                multi_step.capture(progress=progress)
        return multi_step

    def _make_step_graphs(
        self, config: ResolvedConfig, workers: Workers | None, null_slot: int, progress: bool
    ) -> StepGraphRunner | None:
        """None where steps run eagerly: other ranks would have to write the same spare rows."""
        native = isinstance(self._decoder, Decoder)
        if self.device != "cuda" or config.enforce_eager or workers is not None or not native:
            return None
        graphs = StepGraphRunner(self._eager_forward, self.batch, null_slot)
        shared = None if self.multi_step is None else self.multi_step.pool
        with torch.inference_mode():
            pool = shared or torch.cuda.graph_pool_handle()
            graphs.capture(cuda_capture(pool), progress=progress)
        return graphs

    # --- single steps ---

    def next_batch(self) -> _core.ScheduledBatch:
        """See Runner."""
        self.batch.wait_until_read()
        lags = self.device != "cpu" or self.max_steps > 1  # may a worker lag behind this rank?
        if self._worker_group is not None and lags:
            self._worker_group.wait_until_read()
        return self.batch.core

    @torch.inference_mode()
    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """See Runner."""
        self.sampler.update_states(step)
        with self._with_workers(CommandKind.STEP, *self.batch.sizes):
            return self._execute(step)

    def _with_workers(
        self, kind: CommandKind, *numbers: int
    ) -> contextlib.AbstractContextManager[None]:
        """Within it, the workers follow the command, if there are any."""
        if self._worker_group is None:
            return contextlib.nullcontext()
        return self._worker_group.execute(RankCommand(kind, numbers))

    def _execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        inputs = self._inputs(self.batch.sizes)
        logits, scores = self._compute(inputs, step.num_prompt_logprobs)
        sample = self._ranged_sample if profiler_attached() else self.sampler.sample
        sampled = sample(
            logits,
            inputs.rows,
            any_banned=self.batch.core.num_banned > 0,
            allowed_tokens=step.allowed_tokens,
        )
        recorded_now = self._cpu_graph is not None and self._cpu_graph.recorded_now
        recorded_now |= scores is not None  # which takes longer, too
        return ModelRunnerOutput(
            sampled.token_ids, sampled.logprobs, scores, sampled.failures, recorded_now
        )

    def _compute(
        self, inputs: StepInputs, num_prompt_logprobs: int = 0
    ) -> tuple[torch.Tensor, PromptScores | None]:
        """The logits, from a recorded step if there is one, and the scores of prompt tokens."""
        if inputs.scored is not None:
            hidden = self._forward(inputs)
            args = inputs.scored, self._vocab_limit, num_prompt_logprobs
            scores = score_prompts(self._decoder, hidden, *args)
            return self._sampled_logits(hidden, inputs), scores
        if self._cpu_graph is None:
            return self._logits(inputs), None
        return self._cpu_graph.execute(inputs, self._logits), None

    @torch.inference_mode()
    def follow(self, command: RankCommand) -> None:
        """On a worker: its part of what rank 0 launches. Returns when the arrays of the command may
        be overwritten, maybe before the device has computed it."""
        if command.kind == CommandKind.STEP:
            self._compute(self.batch.inputs(StepSizes(*command.numbers)))
            self.batch.wait_until_read()
            return
        assert self.multi_step is not None
        steps = command.numbers[0]
        if command.kind == CommandKind.BEGIN:
            steps, num_seqs, rows, filtered, *_ = command.numbers
            buffer = self.multi_step.buffer(rows)
            assert buffer is not None and self._shared_rows is not None
            buffer.load(self._shared_rows)
            buffer.filtered = bool(filtered)
            self.multi_step.set_rows(buffer, num_seqs)
        self.multi_step.follow(steps)

    def _logits(self, inputs: StepInputs) -> torch.Tensor:
        """float32 [rows that sample, vocab_limit]; on a worker, its part of the vocabulary."""
        return self._sampled_logits(self._forward(inputs), inputs)

    def _inputs(self, sizes: StepSizes) -> StepInputs:
        """The step of these sizes, on its way to the device, with spare rows for its graph."""
        if self._step_graphs is not None:
            self._step_graphs.prepare(sizes)
        return self.batch.inputs(sizes)

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states [T, H], from a graph if there is one. They last until the next step."""
        hidden = None if self._step_graphs is None else self._step_graphs.execute(inputs)
        return self._eager_forward(inputs) if hidden is None else hidden

    def _eager_forward(self, inputs: StepInputs) -> torch.Tensor:
        return self._decoder.forward(inputs.input_ids, self.kv_cache.layers, inputs.attention)

    def _sampled_logits(self, hidden: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        rows = self.ops.gather_rows(hidden, inputs.sample_tokens)
        return self._decoder.logits(rows, self._vocab_limit)

    # --- multi-step decode ---

    def device_batch(self, num_rows: int) -> DeviceBatchBuffer | None:
        """See Runner."""
        return None if self.multi_step is None else self.multi_step.buffer(num_rows)

    @torch.inference_mode()
    def begin_multi_step(self, step: SchedulerOutput) -> None:
        """See Runner."""
        assert self.multi_step is not None and step.device_batch is not None
        self.sampler.update_states(step)
        req_indices = self.batch.req_indices
        buffer, num_seqs = step.device_batch, len(req_indices)
        self.sampler.write(buffer, req_indices)
        if self._worker_group is not None:
            assert self._shared_rows is not None
            self._worker_group.wait_until_read()
            buffer.save(self._shared_rows)
        numbers = step.num_steps, num_seqs, buffer.rows, int(buffer.filtered)
        with self._with_workers(CommandKind.BEGIN, *numbers):
            self.multi_step.begin(buffer, num_seqs, step.num_steps)

    def extend_multi_step(self, num_steps: int) -> None:
        """See Runner."""
        assert self.multi_step is not None
        with self._with_workers(CommandKind.EXTEND, num_steps):
            self.multi_step.launch(num_steps)

    def collect(self) -> ModelRunnerOutput:
        """See Runner."""
        assert self.multi_step is not None
        group = self._worker_group
        with contextlib.nullcontext() if group is None else group.execute(None):
            token_ids, seconds = self.multi_step.collect()
        return ModelRunnerOutput(token_ids, device_seconds=seconds)

    @torch.inference_mode()
    def decode_step(self, rows: DeviceBatchTensors, filtered: bool) -> None:
        """One token for every row of a device batch. Reads and writes its buffers alone, waits for
        nothing, and launches the same kernels each time."""
        meta = AttentionMetadata(
            positions=rows.field("positions"),
            slot_mapping=rows.slot_mapping,
            cu_seqlens_q=self._decode_starts[: len(rows.slot_mapping) + 1],
            context_lens=rows.field("context_lens"),
            block_table=rows.block_table,
            max_seqlen_q=1,
        )
        hidden = self._decoder.forward(rows.field("input_ids"), self.kv_cache.layers, meta)
        assert isinstance(self._decoder, Decoder), "transformers' modules take single steps"
        self._decoder.sample_and_advance(hidden, self._vocab_limit, rows, filtered=filtered)

    def abandon_step(self) -> None:
        """See Runner."""
        self.check_health()
        if self.multi_step is not None:
            self.multi_step.abandon()
        if self._cpu_graph is not None:
            self._cpu_graph.abandon()

    # --- health, and measurements before the first step ---

    def check_health(self) -> None:
        """Raises EngineDeadError if another rank has died."""
        if self._worker_group is not None:
            self._worker_group.check_health()

    def close(self) -> None:
        """Ends the workers, if there are any, and frees weights, KV cache, buffers and recorded
        steps. No step may follow. May be called again."""
        if self._worker_group is not None:
            self._worker_group.close()
        large = (
            "_decoder",
            "kv_cache",
            "batch",
            "sampler",
            "_cpu_graph",
            "multi_step",
            "_step_graphs",
            "_shared_rows",
        )
        for name in (*large, "_ranged_sample", "_decode_starts"):
            vars(self).pop(name, None)
        ops = vars(self).pop("ops", None)
        if self._owns_ops and isinstance(ops, CpuOps):
            ops.close()
        del ops
        if self.device == "cpu":
            return_free_memory()

    def profile_step_costs(self) -> list[tuple[int, float]]:
        """See Runner."""
        largest = len(self.batch.block_table) * self.max_model_len
        return profile_steps(self._dummy_run, min(self._max_samples, largest))

    @torch.inference_mode()
    def warm_up(self, num_rows: int) -> None:
        """See Runner. On a GPU, all is compiled and captured when the model is loaded."""
        if self.device != "cpu":
            return
        table = self.batch.block_table.clone()  # running rows are written in parts
        if self._cpu_graph is not None:
            tokens, rows = self.batch.max_tokens, len(table)
            largest = self.batch.inputs(StepSizes(tokens, rows, rows, tokens))
            self._cpu_graph.reserve(largest, self._logits)
        for rows in range(1, min(num_rows, len(table)) + 1):
            self._dummy_run(rows)()
        self.batch.block_table.copy_(table)

    def _dummy_run(self, tokens: int) -> Callable[[], None]:
        """A step that samples at every token, as steps with drafts do, over the null block."""
        self.next_batch()
        query_lens = even_query_lens(tokens, max_rows=len(self.batch.block_table))
        sizes = self.batch.fill_dummy(query_lens, self.num_blocks, self.kv_cache.block_size)

        @torch.inference_mode()
        def step() -> None:
            inputs = self._inputs(sizes)
            with self._with_workers(CommandKind.STEP, *sizes):
                logits, _ = self._compute(inputs)
            self.sampler.sample(logits, inputs.rows, any_banned=False)

        return step

    def _activation_bytes(self, config: ResolvedConfig) -> int:
        """What the largest step allocates besides weights and cache, measured by a dummy run."""
        if self.device != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logits = run_largest_step(self._decoder, config, self._vocab_limit)
        peak = torch.cuda.max_memory_allocated() - before
        return peak + 2 * logits.nbytes  # filters and log-probabilities keep copies


def make_sampler(
    ops: Ops,
    max_num_seqs: int,
    *,
    vocab_size: int,
    ends: ThinkingEnds,
    device: str,
    max_samples: int = 0,
) -> Sampler:
    """The native sampler for the operations of the CPU, else one over ``ops``."""
    if isinstance(ops, CpuOps):
        return CpuSampler(max_num_seqs, vocab_size=vocab_size, ends=ends)
    return TensorSampler(
        max_num_seqs,
        vocab_size=vocab_size,
        ends=ends,
        ops=ops,
        device=device,
        max_samples=max_samples,
    )


@torch.inference_mode()
def run_largest_step(decoder: CausalLM, config: ResolvedConfig, vocab_limit: int) -> torch.Tensor:
    """A dummy run of ``max_num_batched_tokens`` tokens of one sequence, over a cache of one block.
    Returns the logits of ``max_samples`` rows."""
    device = decoder.device
    cache = KVCache(
        decoder.config,
        num_blocks=1,
        block_size=config.block_size,
        dtype=resolve_cache_dtype(config.kv_cache_dtype, decoder.dtype),
        device=str(device),
    )
    meta = dummy_attention_metadata(
        [config.max_num_batched_tokens], block=0, block_size=config.block_size, device=device
    )
    hidden = decoder.forward(meta.positions, cache.layers, meta)
    rows = hidden[:1].expand(config.max_samples, -1).contiguous()
    return decoder.logits(rows, vocab_limit)
