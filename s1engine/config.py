"""Options of an engine. Frozen, and checked once, in the constructor.

Knows nothing of the model's own facts (layers, end-of-text ids): those come from the model
directory (models/model_config.py). ``runner.resolved_config`` fills in what the device decides.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from s1engine.checks import (
    Check,
    check_bool,
    check_fields,
    check_int,
    check_list,
    check_name,
    check_path,
    check_str,
    float_in,
    int_in,
    name_in,
    str_of,
)
from s1engine.errors import RequestError
from s1engine.tool_formats import TOOL_CALL_PARSERS

BUNDLED_MODEL = Path(__file__).parent / "assets" / "s1-nano"

DType = Literal["auto", "bfloat16", "float16", "float32"]
Quantization = Literal["int8", "int4", "fp8"]
Device = Literal["auto", "cpu", "cuda"]
ModelImpl = Literal["auto", "native", "transformers"]
LoadFormat = Literal["auto", "random", "dummy"]
KVCacheDType = Literal["auto", "int8", "fp8"]
GenerationConfig = Literal["auto", "none"]
DTYPES = get_args(DType)
QUANTIZATIONS = get_args(Quantization)
DEVICES = get_args(Device)
MODEL_IMPLS = get_args(ModelImpl)
LOAD_FORMATS = get_args(LoadFormat)
KV_CACHE_DTYPES = get_args(KVCacheDType)
GENERATION_CONFIGS = get_args(GenerationConfig)
Preset = Literal["latency", "throughput"]
REASONING_FORMATS = (
    "auto", "none", "s1", "think-tag", "mistral", "seed-oss", "openthinker", "gemma4", "gpt-oss",
)  # fmt: skip
MAX_DRAFT = 32
MAX_DRAFTING_SAMPLES = 512  # rows of logits in a step with drafts
MAX_WAITS = 1024
MAX_TOKENS = 2**24
MAX_NAME_CHARS = 1024
MAX_SERVED_NAMES = 64
DEFAULT_ANSWER_RESERVE = 100  # s1's "auto" keeps as many tokens free of thinking


class _Default(int):
    """The default of a field that a preset may replace. A value that is given is a plain int."""


PRESETS: dict[Preset, dict[str, int]] = {
    "latency": {"max_num_seqs": 16, "max_num_batched_tokens": 512, "max_step_ms": 20},
    "throughput": {"max_num_seqs": 512, "max_num_batched_tokens": 4096, "max_step_ms": 0},
}
"""Defaults by preset. Small batches and chunks let every token wait for less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Options of an engine; flags of ``s1engine serve`` carry the same names with dashes.

    Paths may be path objects, numbers those of numpy. Raises RequestError for a wrong value, or for
    values that exclude one another; it names the field.
    """

    model: str = str(BUNDLED_MODEL)
    """Hugging Face directory, GGUF file or hub id; the default is the bundled s1-nano."""
    model_impl: ModelImpl = "auto"
    """``native``: our own decoder. ``transformers``: a module of transformers with our paged
    attention, slower, for other architectures whose layers all attend. ``auto``: native where the
    architecture is supported."""
    dtype: DType = "auto"
    """Weights, and the KV cache unless ``kv_cache_dtype`` says otherwise. ``auto``: the
    checkpoint's own type on CUDA and on CPUs with bf16 instructions, float32 on other CPUs."""
    quantization: Quantization | None = None
    """``int8`` or ``int4`` on the CPU, ``fp8`` (e4m3) on CUDA: quantizes matrices at load. ``fp8``
    keeps embeddings and head as they are, and on CUDA rounds the activations of steps of more than
    64 tokens to fp8 as well. None: the checkpoint's own format."""
    load_format: LoadFormat = "auto"
    """``auto``: the model's weights. ``random`` (``dummy`` in vLLM): weights are drawn, so that
    speed can be measured with config.json and the tokenizer alone; answers mean nothing."""
    device: Device = "auto"
    """``auto``: CUDA if there is a device, else the CPU."""
    preset: Preset | None = None
    """Defaults of ``max_num_seqs``, ``max_num_batched_tokens`` and ``max_step_ms``: ``latency``
    (few sequences and small steps: 16, 512, 20) or ``throughput`` (512, 4096, 0). Options that are
    given win."""
    num_threads: int | None = None
    """Threads of the CPU kernels, for all ranks together. Engines of one process share a thread
    pool, so they must agree. None: torch's number."""
    tensor_parallel_size: int = 1
    """Number of ranks (processes) that share the model: each has one GPU, or on the CPU an equal
    part of the threads."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens. None: the model's own limit."""
    max_num_seqs: int = _Default(256)
    """Sequences that may run at once: rows of the largest batch."""
    max_num_batched_tokens: int = _Default(2048)
    """Tokens of one step over all sequences; longer prompts are computed in chunks."""
    max_step_ms: float | None = None
    """Time that a step may take while a stream or a deadline waits for its end; chunks of prompts
    are sized by the steps measured so far, and every step computes at least 16 tokens of a prompt.
    0: chunks are as large as ``max_num_batched_tokens`` allows. None: 40 on the CPU, 0 on CUDA."""
    block_size: int | None = None
    """Tokens of one KV block, a power of two; prefixes are shared by whole blocks. None: 64 on
    CUDA, 16 on the CPU."""
    kv_cache_memory_gb: float | None = None
    """Size of the KV cache in GiB, on each rank. None: on CUDA ``gpu_memory_utilization`` of what
    is free after the weights; on the CPU a quarter of the available memory, at most 4 GiB, for all
    ranks together."""
    kv_cache_dtype: KVCacheDType = "auto"
    """``auto``: ``dtype``. ``int8`` on the CPU and ``fp8`` (e4m3) on CUDA hold about twice the
    tokens of 16 bits, at some error."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory for weights and KV cache together."""
    enable_prefix_caching: bool = True
    """Reuse computed blocks of prompts and generated tokens in later requests."""
    enforce_eager: bool = False
    """Capture no CUDA graphs and record no CPU steps: every step runs call by call."""
    run_ahead: int | None = None
    """Multi-step decode: most steps that the device decodes by itself, budgets included, before the
    host reads their tokens; fewer if they take long, so that readers and new requests wait little.
    None: 8 on CUDA; 1 (single steps) on the CPU, with ``enforce_eager``, with drafts, and with
    ``tensor_parallel_size`` above 1, which allows no more."""
    num_speculative_tokens: int = 0
    """Longest draft: tokens proposed from the request's own earlier text and verified in one step.
    Outputs stay the same; drafts are shorter, or left out, where they would not pay. 0: off.
    Excludes ``run_ahead``."""
    served_model_name: str | tuple[str, ...] | None = None
    """Name in the API, or several: responses have the first. None: the last part of ``model``."""
    generation_config: GenerationConfig = "auto"
    """``auto``: requests sample as the model's generation_config.json recommends, except for what
    they set themselves. ``none``: that file only adds ends of a turn."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the model's own chat template."""
    reasoning_format: str = "auto"
    """How the model opens and ends its thinking: ``s1``, ``think-tag``, ``mistral``, ``seed-oss``,
    ``openthinker``, ``gemma4``, ``gpt-oss``, or a JSON file that ends in ``.json``; chats then
    think. ``auto``: by the chat template. ``none``: never."""
    reasoning_start: str | None = None
    """Opens the thinking of a model whose format has no name; needs ``reasoning_end``."""
    reasoning_end: str | None = None
    """Ends the thinking of such a model; blanks around it surround a forced end."""
    tool_call_parser: str = "auto"
    """How the model writes tool calls: ``hermes``, ``qwen3_coder``, ``llama3_json``, ``pythonic``,
    ``mistral`` or ``openai`` (gpt-oss), or another engine's name of one. ``auto``: what the chat
    template teaches, in case of doubt ``hermes``."""
    default_thinking_token_budget: int | None = None
    """Thinking budget of requests that think and have none of their own. None: what max_tokens and
    the context leave."""
    default_num_waits: int = 0
    """``num_waits`` of requests that think and do not set it."""
    max_thinking_token_budget: int | None = None
    """Most thinking tokens of any request: larger and unlimited budgets, and the default one, are
    lowered to it. The usage reports the effective budget. None: no limit."""
    overload_thinking_floor: int | None = None
    """While requests wait, lower the thinking budgets of running ones towards this many tokens, the
    further the more wait (all the way at ``max_num_seqs`` waiting requests). None: never."""
    seed: int = 0
    """Seed of requests without one."""
    profile: str | None = None
    """Folder for a trace of steps 9 to 72 by torch's profiler. None: no trace."""

    def __post_init__(self) -> None:
        self._apply_preset()
        check_fields(self, CHECKS)
        self._check_reasoning()
        if self.num_speculative_tokens and (self.run_ahead or 1) > 1:
            raise RequestError(
                f"run_ahead ({self.run_ahead}) and num_speculative_tokens "
                f"({self.num_speculative_tokens}) exclude one another: drafts are made where the "
                "host decides each step",
                param="num_speculative_tokens",
            )
        if self.block_size is not None and self.block_size & (self.block_size - 1):
            raise RequestError("block_size must be a power of two", param="block_size")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise RequestError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs})",
                param="max_num_batched_tokens",
            )

    def _apply_preset(self) -> None:
        """Replaces the defaults of the preset's fields by plain numbers."""
        if self.preset is not None:
            check_name("preset", self.preset, tuple(PRESETS))
        for name in PRESETS["latency"]:
            default = getattr(self, name)
            if self.preset is not None and (default is None or isinstance(default, _Default)):
                object.__setattr__(self, name, PRESETS[self.preset][name])
            elif isinstance(default, _Default):
                object.__setattr__(self, name, int(default))

    def _check_reasoning(self) -> None:
        if not self.reasoning_format.endswith(".json"):
            check_name("reasoning_format", self.reasoning_format, REASONING_FORMATS)
        if (self.reasoning_start is None) != (self.reasoning_end is None):
            missing = "reasoning_start" if self.reasoning_start is None else "reasoning_end"
            raise RequestError(f"{missing} is missing: give both delimiters", param=missing)
        if self.reasoning_start is not None and self.reasoning_format != "auto":
            raise RequestError(
                f"reasoning_start and reasoning_format {self.reasoning_format} exclude one another",
                param="reasoning_start",
            )

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that requests may use."""
        given = self.served_model_name or Path(self.model).name.removesuffix(".gguf")
        return (given,) if isinstance(given, str) else given

    @property
    def model_name(self) -> str:
        """The name that the API shows."""
        return self.model_names[0]

    @property
    def max_samples(self) -> int:
        """Tokens that one step may sample: one a sequence, and one for each drafted token."""
        if not self.num_speculative_tokens:
            return self.max_num_seqs
        wanted = self.max_num_seqs * (1 + self.num_speculative_tokens)
        bound = max(MAX_DRAFTING_SAMPLES, self.max_num_seqs)
        return min(wanted, self.max_num_batched_tokens, bound)


def _check_names(param: str, value: object) -> str | tuple[str, ...]:
    """Returns one name, or several different ones."""
    if isinstance(value, str):
        return check_str(param, value, MAX_NAME_CHARS, min_chars=1)
    items = check_list(param, value, "names", MAX_SERVED_NAMES)
    names = dict.fromkeys(check_str(param, name, MAX_NAME_CHARS, min_chars=1) for name in items)
    if not names:
        raise RequestError(f"{param} is empty", param=param)
    return tuple(names)


CHECKS: dict[str, Check] = {
    "model": check_path,
    "model_impl": name_in(*MODEL_IMPLS),
    "dtype": name_in(*DTYPES),
    "quantization": name_in(*QUANTIZATIONS),
    "load_format": name_in(*LOAD_FORMATS),
    "device": name_in(*DEVICES),
    "preset": name_in(*PRESETS),
    "num_threads": int_in(1, 4096),
    "tensor_parallel_size": int_in(1, 64),
    "max_model_len": int_in(1, MAX_TOKENS),
    "max_num_seqs": int_in(1, 4096),
    "max_num_batched_tokens": int_in(1, 2**20),
    "max_step_ms": float_in(0.0, 1e6),
    "block_size": int_in(1, 1024),
    "kv_cache_memory_gb": float_in(0.0, 2**20),
    "kv_cache_dtype": name_in(*KV_CACHE_DTYPES),
    "gpu_memory_utilization": float_in(0.01, 1.0),
    "enable_prefix_caching": check_bool,
    "enforce_eager": check_bool,
    "run_ahead": int_in(1, 64),
    "num_speculative_tokens": int_in(0, MAX_DRAFT),
    "served_model_name": _check_names,
    "generation_config": name_in(*GENERATION_CONFIGS),
    "chat_template": check_path,
    "reasoning_format": check_path,
    "reasoning_start": str_of(MAX_NAME_CHARS, min_chars=1),
    "reasoning_end": str_of(MAX_NAME_CHARS, min_chars=1),
    "tool_call_parser": name_in(*TOOL_CALL_PARSERS),
    "default_thinking_token_budget": int_in(0, MAX_TOKENS),
    "default_num_waits": int_in(0, MAX_WAITS),
    "max_thinking_token_budget": int_in(1, MAX_TOKENS),
    "overload_thinking_floor": int_in(0, MAX_TOKENS),
    "seed": int_in(0, 2**63 - 1),
    "profile": check_path,
}
"""The check of each field of EngineConfig."""


def parse_speculative_config(text: str) -> int:
    """``num_speculative_tokens`` of vLLM's JSON object; its method must be ngram or suffix."""
    param = "speculative_config"
    try:
        options = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{param} is not JSON: {error}", param=param) from error
    if not isinstance(options, dict) or options.get("method") not in ("ngram", "suffix"):
        raise RequestError(
            f'{param} must be an object whose method is "ngram" or "suffix"; got {text}',
            param=param,
        )
    unknown = sorted(set(options) - {"method", "num_speculative_tokens"})
    if unknown:
        raise RequestError(f"{param} has unknown fields: {', '.join(unknown)}", param=param)
    return check_int("num_speculative_tokens", options.get("num_speculative_tokens"), 1, MAX_DRAFT)
