"""generation_config.json: ends of a turn, and the sampling that a model's authors recommend.

Stated values hold. Fields that would change results and are not supported are refused by name;
unknown names are logged. Knows no weights.
"""

import logging
from pathlib import Path
from typing import Any

from s1engine.checks import shown
from s1engine.models.config_reader import ConfigReader

MAX_SUPPRESSED = 1024
SUPPRESSED_BIAS = -100.0
SAMPLING = ("temperature", "top_k", "top_p", "min_p")

# Fields of transformers that change results and are not supported, with their neutral values.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ([], {}),
    "token_healing": (False,),
    "top_h": (1,),
    "typical_p": (1,),
    "watermarking_config": (),
}

# Fields that change no token here: caches, drafts, what is returned, details of beams. A request
# itself decides ``max_length`` and ``num_return_sequences``.
INERT = frozenset(
    (
        "_from_model_config",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "decoder_start_token_id",
        "disable_compile",
        "early_stopping",
        "is_assistant",
        "length_penalty",
        "low_memory",
        "max_cache_len",
        "max_length",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "remove_invalid_values",
        "renormalize_logits",
        "return_dict_in_generate",
        "speculation_type",
        "target_lookbehind",
        "transformers_version",
        "use_cache",
        "use_mtp",
    )
)
SUPPORTED = frozenset(
    (
        *SAMPLING,
        "do_sample",
        "eos_token_id",
        "max_new_tokens",
        "repetition_penalty",
        "stop_strings",
        "suppress_tokens",
    )
)

logger = logging.getLogger(__name__)


def read_generation_config(folder: Path) -> ConfigReader:
    """The file of a model directory; empty if there is none. Raises ModelError."""
    file = folder / "generation_config.json"
    return ConfigReader.read(file) if file.exists() else ConfigReader(file, {})


def end_token_ids(config: ConfigReader, generation: ConfigReader) -> tuple[int, ...]:
    """The ids that end a turn: generation_config.json's, then config.json's. Raises ModelError."""
    ids: list[int] = []
    for source in (generation, config):
        ids += _token_ids(source, "eos_token_id", config.integer("vocab_size"))
    return tuple(dict.fromkeys(ids))


def sampling_defaults(generation: ConfigReader, vocab_size: int) -> dict[str, Any]:
    """Fields of SamplingParams as the authors recommend them. Raises ModelError.

    Greedy if ``do_sample`` is false in so many words. Otherwise stated values hold, with or without
    ``do_sample``, and a temperature that is not stated is 1.
    """
    defaults: dict[str, Any] = {}
    bounds = {"temperature": 100.0, "top_p": 1.0, "min_p": 1.0, "repetition_penalty": 1000.0}
    for key, high in bounds.items():
        if key in generation:
            defaults[key] = generation.number(key, high=high)
    if "top_k" in generation:
        defaults["top_k"] = max(generation.integer("top_k", low=-1), 0)
    if not generation.flag("do_sample", True):
        defaults["temperature"] = 0.0
    if "max_new_tokens" in generation:
        defaults["max_tokens"] = generation.integer("max_new_tokens")
    suppressed = _token_ids(generation, "suppress_tokens", vocab_size)
    if len(suppressed) > MAX_SUPPRESSED:
        raise generation.error("suppress_tokens", f"has more than {MAX_SUPPRESSED} ids")
    if suppressed:
        defaults["logit_bias"] = dict.fromkeys(suppressed, SUPPRESSED_BIAS)
    if "stop_strings" in generation:
        defaults["stop"] = _stop_strings(generation)
    return defaults


def refuse_unsupported(generation: ConfigReader) -> None:
    """Raises ModelError for a field that would change results and is not supported."""
    for key in generation:
        if key not in generation or key in INERT or key in SUPPORTED:
            continue
        value = generation.get(key)
        if key not in UNSUPPORTED:
            logger.warning("%s: %s is unknown and has no effect", generation.file, key)
        elif value not in UNSUPPORTED[key]:
            raise generation.error(
                key,
                f"({shown(value)}) is not supported; with generation_config none the recommended "
                "sampling is ignored",
            )


def _token_ids(source: ConfigReader, key: str, vocab_size: int) -> list[int]:
    value = source.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise source.error(key, f"must hold ids below {vocab_size}; got {shown(token)}")
    return ids


def _stop_strings(generation: ConfigReader) -> tuple[str, ...]:
    value = generation.get("stop_strings")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise generation.error("stop_strings", f"must be texts; got {shown(value)}")
    return tuple(texts)
