"""llama.cpp embedded through llama-cpp-python: the adapter of ``bench embed``."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "llama_cpp_python"


class EmbeddedLlamaCpp:
    """An EmbeddedModel. Log-probabilities need a model that was loaded for them."""

    concurrent = False

    def __init__(self, path: Path, threads: int, options: dict[str, Any]) -> None:
        self._load = {
            "model_path": str(path),
            "n_ctx": options.get("max_model_len", 4096),
            "n_threads": threads,
            "n_threads_batch": threads,
            "verbose": False,
        }
        self._llama = self._create()
        self._with_logprobs: Any = None

    def _create(self, **more: Any) -> Any:
        from llama_cpp import Llama, llama_cpp

        defaults = llama_cpp.llama_model_default_params

        def without_amx() -> Any:
            """Version 0.3.36 crashes where it packs weights for AMX. Q4_1 has no other packing."""
            params = defaults()
            params.use_extra_bufts = False
            return params

        llama_cpp.llama_model_default_params = without_amx
        try:
            return Llama(**self._load, **more)
        finally:
            llama_cpp.llama_model_default_params = defaults

    def encode(self, text: str) -> list[int]:
        """See EmbeddedModel."""
        ids: list[int] = self._llama.tokenize(text.encode(), add_bos=False)
        return ids

    def stream(self, ids: list[int], new: int, rule: str | None = None) -> Iterator[str]:
        """See EmbeddedModel."""
        rules: dict[str | None, dict[str, Any]] = {
            None: {},
            "penalty": {"repeat_penalty": 1.1},
            "bias": {"logit_bias": {ids[0]: -1.0}},
            "logprobs": {"logprobs": 5},
        }
        llama = self._llama
        if rule == "logprobs":
            llama = self._with_logprobs = self._with_logprobs or self._create(logits_all=True)
        options = {"repeat_penalty": 1.0, **rules[rule]}
        for part in llama.create_completion(
            ids, max_tokens=new, temperature=0, stream=True, **options
        ):
            if part["choices"][0]["finish_reason"] is None:
                yield part["choices"][0]["text"]

    def complete_by(self, ids: list[int], new: int, deadline_s: float) -> int:
        """Stops reading at the deadline, as its users do: it has none of its own."""
        end, count = time.perf_counter() + deadline_s, 0
        for _ in self.stream(ids, new):
            count += 1
            if time.perf_counter() >= end:
                break
        return count


def load(path: Path, threads: int, options: dict[str, Any]) -> EmbeddedLlamaCpp:
    """The model; of ``options`` only ``max_model_len`` matters."""
    return EmbeddedLlamaCpp(path, threads, options)
