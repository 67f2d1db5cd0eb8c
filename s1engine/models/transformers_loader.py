"""From a directory to a TransformersDecoder: weights, shapes of the attention calls, a self-check.

The self-check compares steps over a paged cache with the module's own attention, so a model that
keeps state elsewhere, or mixes sequences of a step, is refused instead of being wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from s1engine.errors import ModelError, RequestError
from s1engine.models.model_facts import ModelFacts
from s1engine.models.paged_interface import STEP, TRACED, AttentionCall, AttentionTrace, register
from s1engine.models.transformers_config import TransformersConfig, unchanged_environment
from s1engine.models.transformers_decoder import TransformersDecoder
from s1engine.ops import AttentionMetadata, Ops

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
"""Relative error of a step's logits that is always accepted; lost state gives about 1."""
NOISE_FACTOR, LARGEST_TOLERANCE = 4, 0.5
"""Accepted as well: a few times what the module's own two implementations differ by."""
CACHE_DIMS = (16, 32, 64, 128, 256, 512)  # of a KV cache, where the operations need such sizes
TRACED_TOKENS = 4
CHECKED_BLOCK_SIZE = 16  # tokens; one block holds a sequence of the self-check
# Tokens of two sequences in each step of the self-check: chunks together and alone, then decode.
CHECKED_STEPS = ((5, 3), (7, 0), (1, 6), (1, 1), (0, 1))


@torch.inference_mode()
def load_transformers_decoder(
    config: TransformersConfig,
    dtype: torch.dtype,
    device: str,
    ops: Ops,
    check_model: Callable[[ModelFacts], None],
    progress: bool = False,
) -> TransformersDecoder:
    """The model of ``config.path``.

    ``check_model`` raises RequestError for shapes that the operations do not cover. Raises
    ModelError, naming the architecture, if paged attention does not give the module's own results.
    """
    with unchanged_environment():
        register()
        module = _load_module(config, dtype, device, progress)
    with _named(config):
        sequences = _random_sequences(config, module.device)
        expected = _own_logits(module, sequences)
        tolerance = _tolerance(module, sequences, expected)
        calls = _trace(module, config)
        facts = _with_cache_shapes(config, calls, check_model)
        decoder = TransformersDecoder(facts, module, ops, calls)
        _check_results(decoder, sequences, expected, tolerance)
    return decoder


@contextmanager
def _named(config: TransformersConfig) -> Iterator[None]:
    """Any error of the module becomes a ModelError with its name."""
    try:
        yield
    except (RequestError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"{config.path}: {config.architecture} cannot run with paged attention: {reason}"
        ) from error


def _load_module(
    config: TransformersConfig, dtype: torch.dtype, device: str, progress: bool
) -> Any:
    """The module with all its weights, from safetensors only."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    expanded = {"quantization_config": Mxfp4Config(dequantize=True)} if config.dequantize else {}
    try:
        with _progress_bar(progress):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                config.path,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                attn_implementation="eager",
                output_loading_info=True,
                **expanded,
            )
    except Exception as error:  # transformers passes on any error of its readers
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{config.path}: transformers cannot load the weights: {reason}"
        ) from error
    module, report = loaded
    names = {"missing_keys": "is missing", "mismatched_keys": "has another shape",
             "unexpected_keys": "is not part of this model"}  # fmt: skip
    for key, why in names.items():
        for name in sorted(map(str, report[key])):
            raise ModelError(f"{config.path}: tensor {name!r} {why}")
    return module.to(device=device).eval().requires_grad_(False)


@contextmanager
def _progress_bar(shown: bool) -> Iterator[None]:
    """Shows or hides transformers' bar."""
    from transformers.utils import logging as library

    logging: Any = library
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def _trace(module: Any, config: TransformersConfig) -> list[AttentionCall]:
    """The attention calls of a forward pass, one a layer."""
    module.set_attn_implementation(TRACED)
    trace = AttentionTrace()
    ids = torch.arange(TRACED_TOKENS, device=module.device)[None]
    module(input_ids=ids, position_ids=ids, use_cache=False, **{STEP: trace})
    if len(trace.calls) != config.num_layers:
        raise ModelError(
            f"{len(trace.calls)} of {config.num_layers} layers attend by transformers' attention "
            "interface; the others may keep state that is not held"
        )
    return trace.calls


def _with_cache_shapes(
    config: TransformersConfig,
    calls: Sequence[AttentionCall],
    check_model: Callable[[ModelFacts], None],
) -> TransformersConfig:
    """The config with the shapes of the calls, and with KV rows that hold the widest head."""
    num_heads, num_kv_heads = calls[0].num_heads, max(call.num_kv_heads for call in calls)
    for call in calls:
        if call.num_heads != num_heads or num_kv_heads % call.num_kv_heads:
            raise ModelError(
                f"layers differ in heads: {num_heads} queries on {num_kv_heads} KV heads, and "
                f"{call.num_heads} on {call.num_kv_heads}"
            )
    widest = max(max(call.key_dim, call.value_dim) for call in calls)
    facts = replace(
        config,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=widest + widest % 2,
        layer_windows=tuple(call.window for call in calls),
    )
    for dim in CACHE_DIMS:
        try:
            check_model(facts)
            return facts
        except RequestError:
            if dim > widest:
                facts = replace(facts, head_dim=dim)
    check_model(facts)
    return facts


def _random_sequences(config: TransformersConfig, device: torch.device) -> list[Tensor]:
    """Token ids of the self-check, one row for each sequence."""
    generator = torch.Generator().manual_seed(0)
    lengths = [sum(tokens) for tokens in zip(*CHECKED_STEPS, strict=True)]
    return [
        torch.randint(config.vocab_size, (length,), generator=generator).to(device)
        for length in lengths
    ]


def _own_logits(module: Any, sequences: Sequence[Tensor]) -> list[Tensor]:
    """The module's logits by its own attention, each sequence alone; float32 [length, V]."""
    return [module(input_ids=ids[None], use_cache=False).logits[0].float() for ids in sequences]


def _tolerance(module: Any, sequences: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The relative error to accept: more than TOLERANCES for a module that amplifies roundings."""
    try:
        module.set_attn_implementation("sdpa")
    except ValueError:  # it has no such implementation
        return TOLERANCES[module.dtype]
    other = torch.cat(_own_logits(module, sequences))
    noise = NOISE_FACTOR * _relative_error(other, torch.cat(list(expected)))
    return min(max(TOLERANCES[module.dtype], noise), LARGEST_TOLERANCE)


def _check_results(
    decoder: TransformersDecoder,
    sequences: Sequence[Tensor],
    expected: Sequence[Tensor],
    tolerance: float,
) -> None:
    """Computes the sequences in the steps of CHECKED_STEPS over a paged cache. Raises ModelError
    if logits differ from ``expected``, the module's own."""
    config, size = decoder.config, CHECKED_BLOCK_SIZE
    shape = (len(sequences), config.num_kv_heads, size, config.head_dim)
    kv = [
        (torch.zeros(shape, dtype=decoder.dtype, device=decoder.device),
         torch.zeros(shape, dtype=decoder.dtype, device=decoder.device))
        for _ in range(config.num_layers)
    ]  # fmt: skip
    done = [0] * len(sequences)
    for counts in CHECKED_STEPS:
        spans = [
            (row, slice(start, start + count))
            for row, (start, count) in enumerate(zip(done, counts, strict=True))
            if count
        ]
        done = [start + count for start, count in zip(done, counts, strict=True)]
        ids = torch.cat([sequences[row][span] for row, span in spans]).int()
        hidden = decoder.forward(ids, kv, _metadata(spans, size, decoder.device))
        logits = decoder.logits(hidden, config.vocab_size)
        error = _relative_error(logits, torch.cat([expected[row][span] for row, span in spans]))
        if not error <= tolerance:
            raise ModelError(f"it gives other results (relative error {error:.2g})")


def _metadata(
    spans: Sequence[tuple[int, slice]], block_size: int, device: torch.device
) -> AttentionMetadata:
    """Of a step with these tokens of these sequences; sequence i has block i."""
    positions = [torch.arange(span.start, span.stop) for _, span in spans]
    slots = [row * block_size + at for (row, _), at in zip(spans, positions, strict=True)]
    lengths = torch.tensor([0, *(len(at) for at in positions)])
    return AttentionMetadata(
        positions=torch.cat(positions).int().to(device),
        slot_mapping=torch.cat(slots).to(device),
        cu_seqlens_q=lengths.cumsum(0).int().to(device),
        context_lens=torch.tensor([span.stop for _, span in spans]).int().to(device),
        block_table=torch.tensor([[row] for row, _ in spans]).int().to(device),
        max_seqlen_q=int(lengths.max()),
    )


def _relative_error(logits: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, but for a constant."""
    size = expected.shape[-1]
    spread = expected - expected.mean(dim=-1, keepdim=True)
    difference = logits[:, :size] - expected[:, : logits.shape[-1]]
    return float(difference.norm() / spread.norm().clamp_min(1e-30))
