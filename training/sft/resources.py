"""What a run needs, from its recipe alone: memory, tokens, operations, hours.

The architecture comes from the recipe (or the model's config.json) and never gets weights. Memory
is that of one GPU at the longest row that the recipe allows, with FSDP2 as in ``model.py``; all
assumptions are printed with the numbers. Units: bytes, and T tokens of a row.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s1engine.errors import RequestError
from s1engine.plan.hardware import GPUS
from s1engine.training.sft.flops import PEAK_TFLOPS, head_dim, training_flops
from s1engine.training.sft.model import create_meta_model, load_architecture
from s1engine.training.sft.packing import schedule
from s1engine.training.sft.samples import load_tokenizer, load_training_set
from s1engine.training.sft.sft_config import SftConfig

FLOAT = 4  # bytes of float32
GPU_GB = {name: GPUS[name].memory_gb for name in ("H100", "H200", "A100", "B200")}
"""Memory by the data sheet, 10^9 bytes."""
RESERVED_BYTES = 4e9
"""Kept free on a GPU for CUDA, NCCL, workspaces, and fragmentation."""
UTILISATIONS = (0.2, 0.4)
"""Shares of the peak for which hours are printed. s1's own run (26 minutes on 16 H100) reached
about 0.2."""

ASSUMPTIONS = """assumptions
  memory: a row of block_size tokens, accumulated gradients, gathered weights of two layers at a
    time; 4 GB stay free for CUDA, NCCL, workspaces of kernels and fragmentation
  compute: 6 operations per weight and token, and causal attention; hours at the given shares of
    the bfloat16 peak, recomputation by checkpointing included; not included: loading, saving,
    and with offload the copies to the host and the optimizer's step there"""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one GPU at the peak of a step."""

    moment: str
    """The part of the step with the peak."""
    weights: int
    """Float32 shards."""
    gradients: int
    """Float32 shards."""
    optimizer: int
    """AdamW's two moments, float32 shards."""
    gathered: int
    """Whole weights of the units in use, and their gradients before they are sharded."""
    activations: int
    """Saved layer inputs, and everything inside one layer (of all layers without checkpointing)."""
    logits: int
    """A chunk of them with its gradient, and the gradients of head and hidden states."""
    host: int
    """In host memory, for each GPU."""

    @property
    def total(self) -> int:
        shards = self.weights + self.gradients + self.optimizer
        return shards + self.gathered + self.activations + self.logits


def estimate_memory(
    config: SftConfig, architecture: Any, tokens: int, num_ranks: int
) -> MemoryEstimate:
    """Peak of a step whose longest row has ``tokens`` tokens: at the loss, inside the backward pass
    of the last layer, or when the embedding's gradient is sharded."""
    compute = 2 if config.compute_dtype == "bfloat16" else FLOAT  # bytes
    units = fsdp_unit_sizes(architecture)
    layer, head, rest = units["layer"], units["head"], units["rest"]
    layers = architecture.num_hidden_layers
    shard = -(-(layers * layer + head + rest) // num_ranks)
    on_gpu = 0 if config.offload == "state" else shard
    inputs = compute * architecture.hidden_size * tokens * (layers + 1)
    inside = layer_activation_bytes(architecture, compute) * tokens
    saved = inputs if config.gradient_checkpointing else inside * layers
    kept = 0 if config.offload == "activations" else saved
    tied_gradient = 0 if head else compute * architecture.vocab_size * architecture.hidden_size
    moments = {  # gathered, activations, logits
        "loss": (
            compute * (layer + head + rest),
            kept,
            _logit_bytes(config, architecture, tokens, compute),
        ),
        "layer": (
            compute * (2 * layer + rest) + (compute + FLOAT) * layer + tied_gradient,
            kept + (inside if config.gradient_checkpointing else 0),
            compute * architecture.hidden_size * tokens,
        ),
        "embedding": ((2 * compute + FLOAT) * rest + tied_gradient, 0, 0),
    }
    name, most = max(moments.items(), key=lambda moment: sum(moment[1]))
    return MemoryEstimate(
        name, FLOAT * on_gpu, FLOAT * on_gpu, 2 * FLOAT * on_gpu, *most,
        host=(4 * FLOAT * shard if config.offload == "state" else 0) + saved - kept,
    )  # fmt: skip


def fsdp_unit_sizes(architecture: Any) -> dict[str, int]:
    """Parameters of FSDP's units: a decoder layer, an untied head, and the rest."""
    single = copy.deepcopy(architecture)
    single.num_hidden_layers = 1
    single.layer_types = ["full_attention"]
    lm: Any = create_meta_model(_PLAIN, single)
    layer = _count_parameters(lm.model.layers[0])
    head = 0 if architecture.tie_word_embeddings else _count_parameters(lm.lm_head)
    return {"layer": layer, "head": head, "rest": _count_parameters(lm) - layer - head}


_PLAIN = SftConfig(
    data=("-",), out="-", model="-", gradient_checkpointing=False, block_size=2
)  # fmt: skip


def _count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def layer_activation_bytes(architecture: Any, compute: int) -> int:
    """Bytes per token that a layer saves for its backward pass: two norms (input in float32,
    normalised, scaled), queries, keys, values, attention's output before and after its heads are
    joined, and of the MLP gate, silu(gate), up and their product."""
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    head = head_dim(architecture)
    queries = architecture.num_attention_heads * head
    keys = architecture.num_key_value_heads * head
    norms = 2 * hidden * (FLOAT + 2 * compute)
    return int(norms + compute * (3 * queries + 2 * keys + 4 * inner))


def _logit_bytes(config: SftConfig, architecture: Any, tokens: int, compute: int) -> int:
    """The chunk in compute dtype and in float32, its softmax in both; the head's gradient in
    float32 with a chunk's share of it; the gradient of the hidden states."""
    chunk = min(config.loss_chunk, tokens)
    vocabulary, hidden = architecture.vocab_size, architecture.hidden_size
    head = (FLOAT + compute) * vocabulary * hidden
    return int(chunk * vocabulary * (2 * FLOAT + compute) + head + 2 * compute * tokens * hidden)


@dataclass(frozen=True, slots=True)
class WorkEstimate:
    """Tokens, steps and operations of a run."""

    counted: bool
    """True: from the data. False: from expected_samples and expected_tokens."""
    samples: int
    epoch_tokens: int
    steps: int
    row_tokens: int
    """Of the longest row."""
    flops: float
    """Of the whole run, recomputation not counted."""


def estimate_work(config: SftConfig, architecture: Any) -> WorkEstimate:
    """Counted if the data exists, otherwise from the expected numbers."""
    if all(Path(file).exists() for file in config.data):
        data = load_training_set(config, load_tokenizer(config))
        lengths = [len(sample.ids) for sample in data.samples]
        steps = schedule(lengths, config)
        longest = max(sum(lengths[i] for i in row) for step in steps for row in step)
        flops = config.epochs * training_flops(architecture, lengths)
        return WorkEstimate(True, len(lengths), sum(lengths), len(steps), longest, flops)
    samples, tokens = config.expected_samples, config.expected_tokens
    if not samples or not tokens:
        raise RequestError(
            f"data: {config.data[0]} does not exist; give expected_samples and expected_tokens",
            param="data",
        )
    rows_per_epoch = -(-tokens // config.block_size) if config.packing else samples
    num_steps = config.epochs * -(-rows_per_epoch // config.batch_rows)
    flops = config.epochs * training_flops(architecture, [tokens / samples]) * samples
    return WorkEstimate(False, samples, tokens, num_steps, config.block_size, flops)


def resource_report(config: SftConfig) -> str:
    """The estimates as text."""
    architecture: Any = load_architecture(config)
    work = estimate_work(config, architecture)
    units = fsdp_unit_sizes(architecture)
    total = architecture.num_hidden_layers * units["layer"] + units["head"] + units["rest"]
    memory = estimate_memory(config, architecture, config.block_size, config.gpus)
    kind = "packed" if config.packing else "one sample each"
    lines = [
        f"parameters   {total / 1e9:,.3f} billion ({architecture.model_type}, "
        f"{architecture.num_hidden_layers} layers of {units['layer'] / 1e6:,.1f} million)",
        f"data         {work.samples:,} samples, {work.epoch_tokens:,} tokens an epoch"
        f" ({'counted' if work.counted else 'expected'})",
        f"steps        {work.steps:,} in {config.epochs} epochs; {config.batch_rows} rows a step, "
        f"{kind}, at most {config.block_size:,} tokens",
        *_memory_lines(config, memory),
        *_hours_lines(config, work),
        ASSUMPTIONS,
    ]
    return "\n".join(lines)


def _memory_lines(config: SftConfig, memory: MemoryEstimate) -> list[str]:
    names = ("weights", "gradients", "optimizer", "gathered", "activations", "logits")
    parts = ", ".join(f"{name} {getattr(memory, name) / 1e9:.3g}" for name in names)
    lines = [
        f"memory       {memory.total / 1e9:,.3g} GB a GPU on {config.gpus} (at the {memory.moment}:"
        f" {parts})",
        f"             {memory.host / 1e9:,.3g} GB in host memory for each GPU",
    ]
    for name, label in GPU_GB.items():
        missing = memory.total - (label * 1e9 - RESERVED_BYTES)
        verdict = "fits" if missing <= 0 else f"lacks {missing / 1e9:.1f} GB"
        lines.append(f"             {name} {label:g} GB: {verdict}")
    return lines


def _hours_lines(config: SftConfig, work: WorkEstimate) -> list[str]:
    lines = [f"compute      {work.flops:.3g} operations"]
    for name in GPU_GB:
        peak = PEAK_TFLOPS[name] * 1e12 * config.gpus
        hours = ", ".join(
            f"{work.flops / (peak * share) / 3600:.3g} h at {share:.0%}" for share in UTILISATIONS
        )
        lines.append(f"             {config.gpus} {name}: {hours}")
    return lines
