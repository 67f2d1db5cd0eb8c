"""``s1engine info``: what this machine has, and what a model needs of it.

The ceilings are measured in about a second, so they describe this moment and this process. The
bound on decoding follows from them: every token of a single sequence reads all weights once.
``--json`` adds what a bug report needs. ``--plan`` describes other machines instead: GPUs by their
data sheets, under a workload.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s1engine.charts.text_table import fact_line
from s1engine.cli.engine_options import engine_options
from s1engine.config import EngineConfig
from s1engine.errors import RequestError
from s1engine.flags import add_flags, given_values
from s1engine.plan.options import PlanOptions

if TYPE_CHECKING:
    import torch

    from s1engine.models.model_facts import ModelFacts
    from s1engine.runner.resolved_config import ResolvedConfig

WEIGHT_FORMATS = ("fp8", "int8", "int4")
CACHED_BYTES = 2**28  # smaller weights may stay in a CPU's caches: memory is no bound


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the engine's flags, which decide how much fits."""
    parser.add_argument("model", nargs="?", help="directory, GGUF file or hub id; default: s1-nano")
    parser.add_argument("--json", action="store_true", help="print one JSON object, all of it")
    parser.add_argument("--no-ceilings", action="store_true", help="measure nothing")
    add_flags(parser.add_argument_group("engine"), EngineConfig, skip=("model",))
    parser.add_argument("--plan", action="store_true", help="for GPUs and a workload; see below")
    add_flags(parser.add_argument_group("plan"), PlanOptions)


def run(args: argparse.Namespace) -> int:
    """Prints the facts, by section."""
    from s1engine.runner.resolved_config import resolve_config

    options = engine_options(args)
    if args.plan:
        return print_plan(args, EngineConfig(**options))
    if plan_options := given_values(args, PlanOptions):
        name = next(iter(plan_options))
        raise RequestError(f"{name} is for a plan; add --plan", param=name)
    config = resolve_config(EngineConfig(**options))
    facts = {"machine": backends(config)}
    if not args.no_ceilings:
        facts["ceilings"] = measure_ceilings(facts["machine"]["device"])
    facts["model"] = model_needs(config, facts["machine"]["device"], facts.get("ceilings"))
    facts["chats"] = chat_rules(config)
    if args.json:
        print(json.dumps({**facts, **report_facts(config)}, default=str))
        return 0
    for section, entries in facts.items():
        print(section)
        for name, value in entries.items():
            print(fact_line(name.replace("_", " "), _format(value)))
    return 0


def print_plan(args: argparse.Namespace, config: EngineConfig) -> int:
    """Prints the plan of a workload on GPUs. The model may be a config.json alone."""
    from s1engine.models.model_config import ModelConfig
    from s1engine.models.model_path import resolve_model
    from s1engine.plan.plan_report import plan_lines, write_plan_page
    from s1engine.plan.planner import build_plan

    options = PlanOptions(**given_values(args, PlanOptions))
    path = Path(config.model).expanduser()
    facts = (
        ModelConfig.from_file(path)
        if path.is_file()
        else ModelConfig.from_dir(resolve_model(config.model))
    )
    plan = build_plan(config, facts, options)
    if options.page is not None:
        write_plan_page(Path(options.page), plan, path.name.removesuffix(".json"))
    print(json.dumps(plan) if args.json else "\n".join(plan_lines(plan)))
    return 0


def report_facts(config: EngineConfig) -> dict[str, Any]:
    """The sections that only ``--json`` prints, for a bug report."""
    from s1engine import __version__
    from s1engine.machine import environment, hardware, software
    from s1engine.models.implementation import read_facts
    from s1engine.models.model_path import resolve_model

    return {
        "software": {"s1engine": __version__, **software()},
        "hardware": hardware(),
        "environment": environment(),
        "engine_config": asdict(config),
        "model_config": asdict(read_facts(resolve_model(config.model), config.model_impl)),
    }


def backends(config: EngineConfig) -> dict[str, Any]:
    """Versions and back ends."""
    import torch

    from s1engine import __version__, _core
    from s1engine.ops import select_ops
    from s1engine.runner.resolved_config import rank_threads

    device = config.device
    return {
        "s1engine": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "operations": select_ops(device, rank_threads(config)).name,
        "cpu_kernels": _core.cpu.isa(),
        "threads": rank_threads(config) or torch.get_num_threads(),
        "preset": config.preset,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
    }


def measure_ceilings(device: str) -> dict[str, Any]:
    """Bandwidth of reading memory, and speed of a large matrix product."""
    import torch

    size = 2**28 if device == "cuda" else 2**26
    x = torch.ones(size, dtype=torch.float32, device=device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    side = 8192 if device == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    return {
        "read_gb_per_s": round(x.nbytes / _seconds(lambda: x.sum(), device) / 1e9, 1),
        "matmul_tflop_per_s": round(2 * side**3 / _seconds(lambda: a @ a, device) / 1e12, 3),
        "matmul_dtype": str(dtype).removeprefix("torch."),
    }


def _seconds(call: Callable[[], object], device: str, rounds: int = 5) -> float:
    """Duration of the fastest of ``rounds`` calls, after one to warm up."""
    import torch

    best = float("inf")
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def model_needs(
    config: "ResolvedConfig", device: str, ceilings: dict[str, Any] | None
) -> dict[str, Any]:
    """Sizes of a model, or of one rank's shard of it, and of its KV cache. Reads no weights."""
    from s1engine.models.implementation import read_facts
    from s1engine.models.model_config import ModelConfig
    from s1engine.models.model_path import resolve_model
    from s1engine.models.shard import Shard, check_tensor_parallel
    from s1engine.models.weight_bytes import weight_bytes
    from s1engine.runner.memory import plan_memory
    from s1engine.runner.resolved_config import resolve_cache_dtype, resolve_dtype

    path = resolve_model(config.model)
    facts = read_facts(path, config.model_impl)
    check_tensor_parallel(facts, config.tensor_parallel_size)
    quantization, native = None, isinstance(facts, ModelConfig)
    if isinstance(facts, ModelConfig):
        facts = Shard(0, config.tensor_parallel_size).config(facts)
        quantization = facts.quantization(config.quantization)
    dtype = resolve_dtype(config.dtype, device, facts.torch_dtype)
    weights = weight_bytes(facts, dtype, quantization)
    cache_dtype = resolve_cache_dtype(config.kv_cache_dtype, dtype)
    max_len, blocks = plan_memory(config, facts, cache_dtype)
    per_token = facts.kv_bytes_per_token(cache_dtype)
    needs: dict[str, Any] = {
        "path": str(path),
        "architecture": facts.architecture,
        "implementation": "native" if native else "transformers",
        "ranks": config.tensor_parallel_size,
        "parameters": facts.num_parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": quantization,
        "weight_bytes": weights.total,
        **_bytes_by_format(facts, dtype),
        "kv_cache_dtype": str(cache_dtype).removeprefix("torch."),
        "kv_bytes_per_token": per_token,
        "max_model_len": max_len,
        "kv_cache_tokens": blocks * config.block_size,
        "kv_cache_bytes": blocks * config.block_size * per_token,
        "kv_cache_resident": "as it is used" if device == "cpu" else "from the start",
    }
    if native and ceilings is not None and weights.total > CACHED_BYTES:
        streamed = weights.total - weights.embedding
        bound = ceilings["read_gb_per_s"] * 1e9 / streamed
        needs["decode_bound_tokens_per_s"] = round(bound, 1)
    return needs


def _bytes_by_format(facts: "ModelFacts", dtype: "torch.dtype") -> dict[str, int]:
    """Weights of a native model, quantised from this dtype: fp8 for CUDA, the others for CPUs."""
    from s1engine.models.model_config import ModelConfig
    from s1engine.models.weight_bytes import weight_bytes

    if not isinstance(facts, ModelConfig):
        return {}
    return {f"weight_bytes_{fmt}": weight_bytes(facts, dtype, fmt).total for fmt in WEIGHT_FORMATS}


def chat_rules(config: EngineConfig) -> dict[str, Any]:
    """How the model's chats think, how they end, and what they sample by default."""
    from s1engine.engine.model_text import ModelText
    from s1engine.models.model_path import resolve_model

    text = ModelText.load(config, resolve_model(config.model))
    rule, tokenizer = text.thinking, text.tokenizer
    rules: dict[str, Any] = {
        "reasoning_format": None if rule.format is None else rule.format.name,
        "thinks_by_default": rule.by_default,
        "because": rule.reason,
    }
    if rule.format is not None:
        rules["thinking_opens_by"] = rule.format.spec.start
        rules["thinking_ends_by"] = list(rule.format.spec.closers)
    ends = [tokenizer.decode([token], skip_special_tokens=False) for token in text.eos_token_ids]
    return {**rules, "turn_ends_by": ends, "sampling": text.config.generation_defaults}


def _format(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_format, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format(part)}" for name, part in value.items())
    if isinstance(value, str):
        return value.replace("\n", "\\n")
    return f"{value:,}" if isinstance(value, int) else str(value)
