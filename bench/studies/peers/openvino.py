"""OpenVINO GenAI: its continuous-batching pipeline over an export of optimum-intel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s1engine.bench.cpu_adapter import EngineSetup, Generate, Ids

PACKAGE = "openvino-genai"
BLOCK = 32  # tokens of a KV block on a CPU


def convert(source: Path, target: Path, precision: str) -> None:
    """Export to OpenVINO; int8 and int4 by NNCF, optimum-intel's default."""
    weights = [] if precision == "bf16" else ["--weight-format", precision]
    command = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(source)]
    command += ["--task", "text-generation-with-past", *weights, str(target)]
    subprocess.run([sys.executable, *command], check=True)


def load(target: Path, setup: EngineSetup) -> Generate:
    """Activations and KV cache in bf16, as the other engines have them."""
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = setup.max_seqs
    scheduler.max_num_batched_tokens = 2048
    scheduler.num_kv_blocks = setup.kv_tokens // BLOCK + 2 * setup.max_seqs + 8
    scheduler.enable_prefix_caching = False
    properties = {
        "INFERENCE_NUM_THREADS": setup.threads,
        "INFERENCE_PRECISION_HINT": "bf16",
        "KV_CACHE_PRECISION": "bf16",
    }
    pipeline: Any = genai.ContinuousBatchingPipeline(str(target), scheduler, "CPU", properties)

    def generate(prompts: list[Ids], new: int) -> list[Ids]:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos = True
        tensors = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        results = pipeline.generate(tensors, [config] * len(tensors))
        return [list(result.m_generation_ids[0]) for result in results]

    return generate
