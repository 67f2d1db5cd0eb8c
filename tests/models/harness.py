"""Runs a model step by step without an engine, and transformers as its oracle."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from s1engine.models.decoder import Decoder
from s1engine.models.interface import CausalLM
from s1engine.models.loader import load_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.ops import Ops
from s1engine.ops.torch_ops import TorchOps
from tests.paged import block_tables, meta_of


def load(path: Path, dtype: torch.dtype = torch.float32, ops: Ops | None = None) -> Decoder:
    """The model of ``path``, by default on torch operations."""
    return load_decoder(path, ModelConfig.from_dir(path), dtype, "cpu", ops or TorchOps())


def oracle(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same model in transformers, with eager attention."""
    name = json.loads((path / "config.json").read_text())["architectures"][0]
    model_class: type[PreTrainedModel] = getattr(transformers, name)
    return model_class.from_pretrained(path, dtype=dtype, attn_implementation="eager")


def oracle_logits(model: PreTrainedModel, prompt: Sequence[int]) -> Tensor:
    """transformers' logits of every token, float32 [len(prompt), V]."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(prompt)])).logits[0]
    return logits.float()


class Rows:
    """Sequences in one KV cache with shuffled block tables; unused slots hold NaN."""

    def __init__(
        self, decoder: CausalLM, rows: int, max_context: int, block_size: int = 4, seed: int = 0,
        vocab_size: int | None = None,
    ) -> None:  # fmt: skip
        self.decoder = decoder
        self.vocab_size = (
            vocab_size or decoder.config.vocab_size
        )  # a rank's decoder has a part of it
        self.block_size = block_size
        self.lens = [0] * rows
        blocks = rows * -(-max_context // block_size) + 3
        self.tables = block_tables(rows, max_context, block_size, blocks, seed)
        config = decoder.config
        shape = (blocks, config.num_kv_heads, block_size, config.head_dim)

        def empty() -> Tensor:
            return torch.full(shape, torch.nan, dtype=decoder.dtype)

        self.kv = [(empty(), empty()) for _ in range(config.num_layers)]

    def step(self, chunks: Sequence[Sequence[int]]) -> list[Tensor]:
        """Append chunks[b] to row b, for rows with a chunk; logits [len(chunk), V] of each."""
        busy = [row for row, chunk in enumerate(chunks) if chunk]
        for row in busy:
            self.lens[row] += len(chunks[row])
        meta = meta_of(
            [len(chunks[row]) for row in busy],
            [self.lens[row] for row in busy],
            self.tables[busy],
            self.block_size,
        )
        ids = torch.tensor([token for chunk in chunks for token in chunk], dtype=torch.int32)
        with torch.inference_mode():
            hidden = self.decoder.forward(ids, self.kv, meta)
            logits = self.decoder.logits(hidden, self.vocab_size)
        return list(torch.split(logits, [len(chunk) for chunk in chunks]))


def run_in_chunks(
    decoder: CausalLM, prompts: Sequence[Sequence[int]], chunk_sizes: Sequence[int]
) -> list[Tensor]:
    """Logits of whole prompts computed together; row b takes chunks of chunk_sizes[b] tokens."""
    rows = Rows(decoder, len(prompts), max(map(len, prompts)))
    results: list[list[Tensor]] = [[] for _ in prompts]
    begin = [0] * len(prompts)
    while any(start < len(prompt) for start, prompt in zip(begin, prompts, strict=True)):
        ends = [start + size for start, size in zip(begin, chunk_sizes, strict=True)]
        chunks = [
            list(prompt[start:end]) for prompt, start, end in zip(prompts, begin, ends, strict=True)
        ]
        for result, logits in zip(results, rows.step(chunks), strict=True):
            result.append(logits)
        begin = ends
    return [torch.cat(result) for result in results]
