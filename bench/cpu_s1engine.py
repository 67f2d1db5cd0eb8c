"""Adapter of s1engine for ``bench cpu``: it runs in its own process like every other engine."""

from pathlib import Path
from typing import Any

from s1engine.bench.cpu_adapter import EngineSetup, Generate, Ids

PACKAGE = "s1engine"


def convert(source: Path, target: Path, precision: str) -> None:
    """Link the directory: the engine reads it as it is and quantises at load."""
    target.symlink_to(source.resolve())


def options(setup: EngineSetup) -> dict[str, Any]:
    """Fields of EngineConfig."""
    quantization = {} if setup.precision == "bf16" else {"quantization": setup.precision}
    return {
        "dtype": "bfloat16",
        "device": "cpu",
        "max_num_seqs": setup.max_seqs,
        "max_model_len": setup.max_len,
        "kv_cache_memory_gb": setup.kv_tokens * setup.kv_token_bytes * 1.1 / 2**30 + 0.01,
        "enable_prefix_caching": False,
        **quantization,
    }


def load(target: Path, setup: EngineSetup) -> Generate:
    """The offline engine."""
    from s1engine.engine.llm import LLM
    from s1engine.sampling_params import SamplingParams

    llm = LLM(str(target), progress=False, **options(setup))

    def generate(prompts: list[Ids], new: int) -> list[Ids]:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        outputs = llm.generate(prompts, params, progress=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate
