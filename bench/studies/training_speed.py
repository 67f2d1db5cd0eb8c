"""Packing of s1K's lengths, and training tokens/s against a plain transformers loop.

The plain loop is transformers' Trainer by default, written out: batches of samples padded to the
longest, transformers' attention and loss, AdamW. Both train the same model on the same samples in
this process, in turns, with about the same number of tokens a step.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from s1engine.training.sft.distributed import DistributedContext, init_distributed
from s1engine.training.sft.model import load_architecture, load_model
from s1engine.training.sft.optimizer import create_optimizer
from s1engine.training.sft.packing import efficiency, pack, schedule
from s1engine.training.sft.samples import TokenizedSample
from s1engine.training.sft.sft_config import SftConfig
from s1engine.training.sft.trainer import Trainer

S1K_PROMPT_AND_ANSWER = 600
"""Tokens added to each trace for its question and answer; the histogram holds traces only."""


def s1k_lengths(histogram: Path, column: str, seed: int) -> list[int]:
    """1,000 sample lengths drawn from the published histogram, uniform inside a bin."""
    bins = json.loads(histogram.read_text())
    rng = random.Random(seed)
    edges = bins["bin_edges"]
    return [
        int(rng.uniform(edges[i], edges[i + 1])) + S1K_PROMPT_AND_ANSWER
        for i, count in enumerate(bins[column])
        for _ in range(count)
    ]


def packing(histogram: Path) -> dict[str, Any]:
    """Share of a row's tokens that belong to samples: packed, and padded to the longest of 16."""
    shares: dict[str, Any] = {}
    for column, blocks in (("s1K_gemini", (10240, 32768)), ("s1K_1_1_r1", (32768,))):
        lengths = s1k_lengths(histogram, column, 0)
        for block in blocks:
            bins = pack(lengths, block)
            shares[f"{column}_{block}"] = round(efficiency(lengths, bins, block), 4)
        order = random.Random(0).sample(lengths, len(lengths))
        padded = sum(
            max(order[i : i + 16]) * len(order[i : i + 16]) for i in range(0, len(order), 16)
        )
        shares[f"{column}_padded_16"] = round(sum(lengths) / padded, 4)
    return shares


def make_samples(count: int, vocabulary: int, longest: int, seed: int) -> list[TokenizedSample]:
    """Random tokens, with lengths distributed like s1K's: few short ones, most in the upper
    half."""
    rng = random.Random(seed)
    sizes = [max(8, int(longest * rng.betavariate(4, 3))) for _ in range(count)]
    return [
        TokenizedSample(
            tuple(rng.randrange(vocabulary) for _ in range(size)), size // 5, f"sample {i}"
        )
        for i, size in enumerate(sizes)
    ]


class PlainLoop:
    """Padded batches through transformers' forward pass."""

    def __init__(self, config: SftConfig, samples: Sequence[TokenizedSample], batch: int) -> None:
        torch.manual_seed(config.seed)
        self.model: Any = AutoModelForCausalLM.from_config(
            load_architecture(config), dtype=torch.float32, attn_implementation="sdpa"
        ).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate)
        order = random.Random(0).sample(list(samples), len(samples))
        self.batches = [order[i : i + batch] for i in range(0, len(order), batch)]

    def epoch(self) -> Iterator[int]:
        """Tokens of each step, padding not counted."""
        for batch in self.batches:
            ids, mask, labels = _padded(batch)
            loss = self.model(
                input_ids=ids, attention_mask=mask, labels=labels, use_cache=False
            ).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            yield sum(len(sample.ids) for sample in batch)


def _padded(batch: Sequence[TokenizedSample]) -> tuple[Tensor, Tensor, Tensor]:
    width = max(len(sample.ids) for sample in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    labels = torch.full((len(batch), width), -100)
    for row, sample in enumerate(batch):
        n = len(sample.ids)
        ids[row, :n] = torch.tensor(sample.ids)
        labels[row, sample.num_prompt : n] = ids[row, sample.num_prompt : n]
    mask = torch.tensor([[int(i < len(s.ids)) for i in range(width)] for s in batch])
    return ids, mask, labels


def ours(
    config: SftConfig, samples: Sequence[TokenizedSample], ranks: DistributedContext
) -> Trainer:
    """The trainer's step over the same samples."""
    model = load_model(config, ranks)
    steps = schedule([len(sample.ids) for sample in samples], config)
    return Trainer(config, ranks, samples, steps, model, create_optimizer(model, config))


def _ours_epoch(trainer: Trainer) -> Iterator[int]:
    for number, step in enumerate(trainer.steps):
        trainer.step(number)
        yield sum(len(trainer.samples[i].ids) for row in step for i in row)


def _rate(epoch: Iterator[int]) -> float:
    begin = time.perf_counter()
    tokens = sum(epoch)
    return tokens / (time.perf_counter() - begin)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run both loops in turns over the same samples; medians, and the ratio of each turn."""
    config = SftConfig.from_dict({
        "data": ["-"], "out": "-", "tokenizer": "-", "compute_dtype": "float32", "epochs": 1,
        "gradient_checkpointing": False, "block_size": args.block_size, "batch_rows": 1,
        "threads": args.threads, "learning_rate": 1e-4,
        "architecture": {
            "model_type": "qwen2", "hidden_size": args.hidden, "num_hidden_layers": args.layers,
            "intermediate_size": 11 * args.hidden // 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": args.vocabulary, "tie_word_embeddings": True,
            "max_position_embeddings": args.block_size,
        },
    })  # fmt: skip
    samples = make_samples(args.samples, args.vocabulary, args.longest, seed=0)
    mean = sum(len(sample.ids) for sample in samples) / len(samples)
    plain = PlainLoop(config, samples, batch=max(1, round(args.block_size / mean)))
    rates: dict[str, list[float]] = {"s1engine": [], "transformers": []}
    with init_distributed(args.threads) as ranks:
        trainer = ours(config, samples, ranks)
        _rate(_ours_epoch(trainer)), _rate(plain.epoch())  # warm-up
        for _ in range(args.rounds):
            rates["s1engine"].append(_rate(_ours_epoch(trainer)))
            rates["transformers"].append(_rate(plain.epoch()))
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    result: dict[str, Any] = {
        "tokens_per_s": {name: round(statistics.median(r), 1) for name, r in rates.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "shape": {"hidden": args.hidden, "layers": args.layers, "vocabulary": args.vocabulary},
        "samples": args.samples,
        "longest": args.longest,
        "block_size": args.block_size,
    }
    if args.histogram is not None:
        result["packing"] = packing(args.histogram)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    parser.add_argument("--histogram", type=Path, help="s1k_trace_length_hist.json, for packing")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--longest", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--block-size", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
