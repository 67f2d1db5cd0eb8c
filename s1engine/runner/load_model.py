"""From the options of an engine to a model on its device, native or computed by transformers.

Refuses options and shapes that the implementation or the operations do not cover, before weights
are read where that is possible.
"""

import logging
from pathlib import Path

import torch

from s1engine.errors import ModelError, RequestError
from s1engine.models.collective import Collective
from s1engine.models.interface import CausalLM
from s1engine.models.loader import load_decoder, random_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.models.model_facts import ModelFacts
from s1engine.models.shard import UNSHARDED
from s1engine.models.transformers_config import TransformersConfig
from s1engine.models.weight_bytes import weight_bytes
from s1engine.ops import Ops
from s1engine.runner.memory import GIB, check_weights_fit
from s1engine.runner.resolved_config import RUN_AHEAD, ResolvedConfig

MAX_TABLE_BYTES = 2**28  # of a rotary table that is larger than the weights
FURTHER_POSITIONS = 128  # a step may compute beyond the end of a sequence, as drafts do

logger = logging.getLogger(__name__)


def load_model(
    config: ResolvedConfig,
    facts: ModelFacts,
    path: Path | CausalLM,
    ops: Ops,
    *,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    collective: Collective | None,
    progress: bool,
) -> CausalLM:
    """The model, or this rank's part of it.

    Args:
        facts: of the whole model.
        path: its directory, or a model that is in memory already, which is checked only.
        cache_dtype: of the KV cache.
    """

    def check_covered(own: ModelFacts, quantization: str | None = None) -> None:
        ops.check_model(
            head_dim=own.head_dim,
            num_heads=own.num_heads,
            num_kv_heads=own.num_kv_heads,
            block_size=config.block_size,
            dtype=dtype,
            cache_dtype=cache_dtype,
            quantization=quantization,
        )

    if isinstance(facts, TransformersConfig):
        from s1engine.models.transformers_loader import load_transformers_decoder

        _check_options(config, facts)
        check_weights_fit(facts, dtype, config.device, None)
        return load_transformers_decoder(
            facts, dtype, config.device, ops, check_covered, progress=progress
        )
    assert isinstance(facts, ModelConfig)
    own = (UNSHARDED if collective is None else collective.shard).config(facts)
    quantization = facts.quantization(config.quantization)
    check_covered(own, quantization)
    if not isinstance(path, Path):
        return path
    check_weights_fit(own, dtype, config.device, quantization)
    max_positions = _num_positions(config, own, weight_bytes(own, dtype, quantization).total)
    if config.load_format != "auto":
        _check_random(config)
        return random_decoder(
            own, dtype, config.device, ops, max_positions=max_positions, quantization=quantization
        )
    return load_decoder(
        path,
        facts,
        dtype,
        config.device,
        ops,
        progress=progress,
        max_positions=max_positions,
        quantization=quantization,
        collective=collective,
    )


def _check_random(config: ResolvedConfig) -> None:
    """Raises RequestError where ranks would draw different weights."""
    if config.tensor_parallel_size > 1:
        raise RequestError(
            f"load_format {config.load_format}: tensor_parallel_size must be 1, since each rank "
            "would draw weights of its own",
            param="load_format",
        )
    logger.warning("the weights are random: only speed means something")


def _check_options(config: ResolvedConfig, facts: TransformersConfig) -> None:
    """Raises RequestError for what only native models have; ranks are checked by shard.py."""
    if config.run_ahead not in (1, RUN_AHEAD[config.device]):
        raise RequestError(
            f"run_ahead {config.run_ahead}: {facts.architecture} is computed by transformers, one "
            "step at a time; leave it out",
            param="run_ahead",
        )
    if config.load_format != "auto":
        raise RequestError(
            f"load_format {config.load_format}: {facts.architecture} is computed by transformers, "
            "whose modules load their own weights; leave it out",
            param="load_format",
        )
    if config.quantization is not None:
        raise RequestError(
            f"quantization {config.quantization}: {facts.architecture} is computed by "
            "transformers, which uses the weights as they are; leave it out",
            param="quantization",
        )
    logger.warning(
        "%s is computed by transformers: slower than a native model, every step runs call by call",
        facts.architecture,
    )


def _num_positions(config: ResolvedConfig, model: ModelConfig, weights: int) -> int:
    """Rows of the rotary tables. Raises ModelError if the model's own bound would make them larger
    than its weights: such a bound is a mistake, or made to exhaust the memory."""
    longest = model.max_position_embeddings
    if config.max_model_len is not None and "long_factor" not in (model.rope.scaling or {}):
        # Longrope depends on the model's own bound.
        longest = min(longest, config.max_model_len + FURTHER_POSITIONS)
    table = longest * model.head_dim * torch.float32.itemsize
    if table > max(weights, MAX_TABLE_BYTES):
        raise ModelError(
            f"max_position_embeddings {model.max_position_embeddings}: the rotary table takes "
            f"{table / GIB:.1f} GiB, more than the weights; set max_model_len"
        )
    return longest
