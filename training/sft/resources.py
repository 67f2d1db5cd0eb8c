"""What a run will take, from its recipe alone: memory, tokens, operations, hours.

The architecture comes from the recipe (or the model's config.json) and is never given weights. The
memory is that of one GPU at the longest row the recipe allows, with FSDP2 as ``model.shard`` sets
it up; every assumption is printed with the numbers. Units: bytes, and tokens T of a row.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s1engine.errors import RequestError
from s1engine.plan.hardware import GPUS
from s1engine.training.sft import model as models
from s1engine.training.sft import samples
from s1engine.training.sft.flops import PEAK_TFLOPS, head_dim, training_flops
from s1engine.training.sft.packing import schedule
from s1engine.training.sft.sft_config import SftConfig

FLOAT = 4  # bytes of float32
GPU_GB = {name: GPUS[name].memory_gb for name in ("H100", "H200", "A100", "B200")}
"""Memory on the label, 10^9 bytes."""
ALLOWANCE = 4e9
"""Left free on a GPU: CUDA, NCCL, workspaces, fragmentation."""
UTILISATIONS = (0.2, 0.4)
"""Shares of the peak for which hours are given. s1's own run of 26 minutes on 16 H100 works out at
about 0.2."""

ASSUMPTIONS = """assumptions
  memory: a row of block_size tokens, gradients accumulated, two layers' weights gathered at a
    time; CUDA, NCCL, workspaces of kernels and fragmentation have 4 GB left for them
  compute: 6 operations a weight and token, and causal attention; hours at the named shares of
    the bfloat16 peak, checkpointing's recomputation inside them; not counted are loading, saving,
    and with offload the copies to the host and the optimizer's step there"""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU at the moment of a step when most are held."""

    moment: str
    weights: int
    """Float32 shards."""
    gradients: int
    """Float32 shards."""
    optimizer: int
    """AdamW's two moments, float32 shards."""
    gathered: int
    """Whole weights of the units in use, and their gradients on the way to the shards."""
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


def memory(config: SftConfig, architecture: Any, tokens: int, ranks: int) -> Memory:
    """Peak of a step whose longest row has ``tokens`` tokens: at the loss, inside the backward pass
    of the last layer, or when the embedding's gradient is on its way to the shards."""
    c = 2 if config.compute_dtype == "bfloat16" else FLOAT
    units = unit_sizes(architecture)
    layer, head, rest = units["layer"], units["head"], units["rest"]
    layers = architecture.num_hidden_layers
    shard = -(-(layers * layer + head + rest) // ranks)
    on_gpu = 0 if config.offload == "state" else shard
    inputs = c * architecture.hidden_size * tokens * (layers + 1)
    inside = layer_bytes(architecture, c) * tokens
    saved = inputs if config.gradient_checkpointing else inside * layers
    kept = 0 if config.offload == "activations" else saved
    tied_gradient = 0 if head else c * architecture.vocab_size * architecture.hidden_size
    moments = {
        "loss": (c * (layer + head + rest), kept, _logits(config, architecture, tokens, c)),
        "layer": (
            c * (2 * layer + rest) + (c + FLOAT) * layer + tied_gradient,
            kept + (inside if config.gradient_checkpointing else 0),
            c * architecture.hidden_size * tokens,
        ),
        "embedding": ((2 * c + FLOAT) * rest + tied_gradient, 0, 0),
    }
    name, most = max(moments.items(), key=lambda moment: sum(moment[1]))
    return Memory(
        name, FLOAT * on_gpu, FLOAT * on_gpu, 2 * FLOAT * on_gpu, *most,
        host=(4 * FLOAT * shard if config.offload == "state" else 0) + saved - kept,
    )  # fmt: skip


def unit_sizes(architecture: Any) -> dict[str, int]:
    """Parameters of FSDP's units: a decoder layer, an untied head, and the rest."""
    single = copy.deepcopy(architecture)
    single.num_hidden_layers = 1
    single.layer_types = ["full_attention"]
    lm: Any = models.build(_PLAIN, single)
    layer = _parameters(lm.model.layers[0])
    head = 0 if architecture.tie_word_embeddings else _parameters(lm.lm_head)
    return {"layer": layer, "head": head, "rest": _parameters(lm) - layer - head}


_PLAIN = SftConfig(
    data=("-",), out="-", model="-", gradient_checkpointing=False, block_size=2
)  # fmt: skip


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def layer_bytes(architecture: Any, c: int) -> int:
    """Saved inside a layer for its backward pass, per token: two norms (their input in float32,
    normalised, scaled), queries, keys, values, attention's output before and after its heads are
    joined, and of the MLP gate, silu(gate), up and their product."""
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    head = head_dim(architecture)
    queries = architecture.num_attention_heads * head
    keys = architecture.num_key_value_heads * head
    norms = 2 * hidden * (FLOAT + 2 * c)
    return int(norms + c * (3 * queries + 2 * keys + 4 * inner))


def _logits(config: SftConfig, architecture: Any, tokens: int, c: int) -> int:
    """The chunk in compute type and in float32, its softmax and that in compute type; the head's
    gradient in float32 with a chunk's share of it; the gradient of the hidden states."""
    chunk = min(config.loss_chunk, tokens)
    vocabulary, hidden = architecture.vocab_size, architecture.hidden_size
    head = (FLOAT + c) * vocabulary * hidden
    return int(chunk * vocabulary * (2 * FLOAT + c) + head + 2 * c * tokens * hidden)


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do."""

    counted: bool
    """From the data, else from expected_samples and expected_tokens."""
    samples: int
    epoch_tokens: int
    steps: int
    row_tokens: int
    """Of the longest row."""
    flops: float
    """Of the whole run, recomputation not counted."""


def work(config: SftConfig, architecture: Any) -> Work:
    """Tokens, steps and operations: counted where the data is at hand, else as expected."""
    if all(Path(file).exists() for file in config.data):
        data = samples.load(config, samples.load_tokenizer(config))
        lengths = [len(sample.ids) for sample in data.samples]
        rows = [sum(lengths[i] for i in row) for step in schedule(lengths, config) for row in step]
        steps = len(schedule(lengths, config))
        flops = config.epochs * training_flops(architecture, lengths)
        return Work(True, len(lengths), sum(lengths), steps, max(rows), flops)
    if not config.expected_samples or not config.expected_tokens:
        raise RequestError(
            f"data: {config.data[0]} is not here; give expected_samples and expected_tokens",
            param="data",
        )
    mean = config.expected_tokens / config.expected_samples
    packed = -(-config.expected_tokens // config.block_size)
    rows_an_epoch = packed if config.packing else config.expected_samples
    steps = config.epochs * -(-rows_an_epoch // config.batch_rows)
    flops = config.epochs * training_flops(architecture, [mean]) * config.expected_samples
    return Work(
        False, config.expected_samples, config.expected_tokens, steps, config.block_size, flops
    )


def make_plan(config: SftConfig) -> str:
    """The plan as text."""
    architecture: Any = models.hf_config(config)
    todo = work(config, architecture)
    units = unit_sizes(architecture)
    total = architecture.num_hidden_layers * units["layer"] + units["head"] + units["rest"]
    held = memory(config, architecture, config.block_size, config.gpus)
    kind = "packed" if config.packing else "one sample each"
    lines = [
        f"parameters   {total / 1e9:,.3f} billion ({architecture.model_type}, "
        f"{architecture.num_hidden_layers} layers of {units['layer'] / 1e6:,.1f} million)",
        f"data         {todo.samples:,} samples, {todo.epoch_tokens:,} tokens an epoch"
        f" ({'counted' if todo.counted else 'expected'})",
        f"steps        {todo.steps:,} in {config.epochs} epochs; {config.batch_rows} rows a step, "
        f"{kind}, at most {config.block_size:,} tokens",
        *_memory_lines(config, held),
        *_hours_lines(config, todo),
        ASSUMPTIONS,
    ]
    return "\n".join(lines)


def _memory_lines(config: SftConfig, held: Memory) -> list[str]:
    parts = ("weights", "gradients", "optimizer", "gathered", "activations", "logits")
    told = ", ".join(f"{name} {getattr(held, name) / 1e9:.3g}" for name in parts)
    lines = [
        f"memory       {held.total / 1e9:,.3g} GB a GPU on {config.gpus} (at the {held.moment}:"
        f" {told})",
        f"             {held.host / 1e9:,.3g} GB in host memory for each GPU",
    ]
    for name, label in GPU_GB.items():
        room = label * 1e9 - ALLOWANCE
        verdict = "fits" if held.total <= room else f"lacks {(held.total - room) / 1e9:.1f} GB"
        lines.append(f"             {name} {label:g} GB: {verdict}")
    return lines


def _hours_lines(config: SftConfig, todo: Work) -> list[str]:
    lines = [f"compute      {todo.flops:.3g} operations"]
    for name in GPU_GB:
        peak = PEAK_TFLOPS[name] * 1e12 * config.gpus
        hours = [todo.flops / (peak * share) / 3600 for share in UTILISATIONS]
        told = ", ".join(
            f"{hour:.3g} h at {share:.0%}" for hour, share in zip(hours, UTILISATIONS, strict=True)
        )
        lines.append(f"             {config.gpus} {name}: {told}")
    return lines
