"""Trains s1-nano from scratch: a Qwen2 model of 0.8 M parameters that computes step by step.

    python -m s1engine.training.examples.nano --out FIRST
    python -m s1engine.training.examples.nano --out SECOND --start FIRST --seed 1 --steps 2400 \\
        --learning-rate 6e-4 --warmup-steps 50 --curriculum-steps 1 --tail 8
    python -m s1engine.training.examples.nano --out THIRD --start SECOND --seed 2 --steps 1000 \\
        --batch-tokens 4096 --learning-rate 5e-4 --warmup-steps 50 --curriculum-steps 1 \\
        --tail 8 --checks 3 --threads 2
    python -m s1engine.training.examples.nano --out FOURTH --start THIRD --seed 3 --steps 900 \\
        --batch-tokens 4096 --learning-rate 1e-3 --warmup-steps 50 --curriculum-steps 1 \\
        --tail 5 --checks 2 --threads 2

The first run learns the task. The others are short; they train what the first run rarely sees: the
longest chains, and checks after "Wait".

Reads top to bottom: samples are drawn on the fly (short chains first), batches hold a fixed number
of tokens, AdamW has warm-up and cosine decay, held-out questions are evaluated at intervals. The
same seed on the same machine and number of threads gives the same weights.
"""

import argparse
import functools
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from s1engine.eval.arithmetic import MIN_STEPS, draw_steps, generate, is_held_out, render
from s1engine.eval.grade import extract_answer
from s1engine.training.examples.arithmetic_traces import ChatSample, draw_sample
from s1engine.training.examples.nano_tokenizer import SPECIAL, build_tokenizer, save_tokenizer

IGNORED = -100
LONGEST = 16  # steps of a chain; questions of users have at most 14
EMBEDDING_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class NanoRecipe:
    """One run; the defaults are the first run of the bundled weights."""

    seed: int = 0
    steps: int = 9000
    batch_tokens: int = 2048
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    clip: float = 1.0
    curriculum_steps: int = 240  # optimizer steps after which chains may be one longer
    tail: int = 0  # additional shares of the longest chains
    checks: int = 0  # checks of a sample, uniform up to this; 0: weighted by CHECKS
    evaluate_every: int = 500
    threads: int = 1


def create_model(vocab_size: int) -> Qwen2ForCausalLM:
    """Random weights; the embedding is padded to a multiple of 64 rows."""
    config = Qwen2Config(
        vocab_size=-(-vocab_size // EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.06,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|im_end|>"),
        pad_token_id=SPECIAL.index("<|endoftext|>"),
    )
    return Qwen2ForCausalLM(config)


def tokenize(
    encode: Callable[[str], list[int]], sample: ChatSample, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Token ids and labels; a cut sample loses a random end of its thinking."""
    ids: list[int] = []
    labels: list[int] = []

    def add(text: str, loss: bool) -> None:
        tokens = encode(text)
        ids.extend(tokens)
        labels.extend(tokens if loss else [IGNORED] * len(tokens))

    for piece in sample.pieces[: sample.thinking.start]:
        add(piece.text, piece.loss)
    begin = len(ids)
    for piece in sample.pieces[sample.thinking]:
        add(piece.text, piece.loss)
    if sample.cut:
        keep = rng.randint(begin, len(ids))
        del ids[keep:], labels[keep:]
        newline = encode("\n")
        if ids[-1:] != newline:
            ids += newline
            labels += [IGNORED] * len(newline)
    for piece in sample.pieces[sample.thinking.stop :]:
        add(piece.text, piece.loss)
    if sample.cut:  # the engine forces the delimiter there
        answer = encode("<|im_start|>answer\nFinal Answer:")
        end = len(ids) - len(encode(sample.pieces[-1].text)) + len(answer)
        labels[end - len(answer) : end] = [IGNORED] * len(answer)
    return ids, labels


def batches(
    recipe: NanoRecipe, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and labels [B, T] without end. Chains of a batch have similar lengths, so it has little
    padding."""
    rng = random.Random(recipe.seed)
    encode = functools.lru_cache(2**16)(tokenizer.encode)  # lines recur, questions rarely do
    step = 0
    while True:
        longest = min(LONGEST, MIN_STEPS + 2 + step // recipe.curriculum_steps)
        high = min(rng.randint(MIN_STEPS, longest + recipe.tail), longest)
        rows: list[tuple[list[int], list[int]]] = []
        width = 0
        while width * (len(rows) + 1) <= recipe.batch_tokens:
            steps = draw_steps(rng, rng.randint(max(MIN_STEPS, high - 2), high))
            if is_held_out(render(steps)):
                continue
            rows.append(tokenize(encode, draw_sample(rng, steps, recipe.checks), rng))
            width = max(width, len(rows[-1][0]))
        pad = tokenizer.pad_token_id
        yield (
            torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
            torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
        )
        step += 1


def learning_rate(recipe: NanoRecipe, step: int) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(recipe.steps - recipe.warmup_steps, 1)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@torch.inference_mode()
def accuracy(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, count: int = 32
) -> float:
    """Share of held-out questions of ``steps`` steps that greedy decoding answers correctly."""
    questions = generate(1, count, steps, steps)
    chats = [[{"role": "user", "content": q.question}] for q in questions]
    prompts = [
        f"{tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)}"
        "<|im_start|>think"
        for chat in chats
    ]
    ids = torch.tensor([tokenizer.encode(prompt) for prompt in prompts])  # all of the same length
    model.eval()
    out = model.generate(  # type: ignore[misc]  # transformers declares self as a protocol
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=(steps + 3) * 10,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.train()
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    right = [extract_answer(t) == q.answer for t, q in zip(texts, questions, strict=True)]
    return sum(right) / count


def save_model(model: Qwen2ForCausalLM, directory: Path) -> None:
    """A Hugging Face directory: bf16 weights, greedy generation defaults, the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    half = Qwen2ForCausalLM(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    half.config.reasoning_format = "s1"
    half.save_pretrained(directory)
    save_tokenizer(directory)
    defaults = {"do_sample": False, "eos_token_id": model.config.eos_token_id}
    (directory / "generation_config.json").write_text(json.dumps(defaults, indent=2) + "\n")


def train(recipe: NanoRecipe, out: Path, start: Path | None = None) -> Qwen2ForCausalLM:
    """Runs the recipe, from the weights in ``start`` if given; saves the weights at each
    evaluation."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    tokenizer = build_tokenizer()
    model = create_model(len(tokenizer))
    if start is not None:
        model.load_state_dict(Qwen2ForCausalLM.from_pretrained(start).float().state_dict())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    stream = batches(recipe, tokenizer)
    tokens = 0
    with tqdm(range(recipe.steps), unit="step") as bar:
        for step in bar:
            ids, labels = next(stream)
            loss = train_step(
                model, optimizer, ids, labels, learning_rate(recipe, step), recipe.clip
            )
            tokens += ids.numel()
            rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s", refresh=False)
            if (step + 1) % recipe.evaluate_every == 0 or step + 1 == recipe.steps:
                shares = {n: accuracy(model, tokenizer, n) for n in (2, 6, 11, 16)}
                bar.write(f"step {step + 1}, loss {loss:.4f}, tokens {tokens}, right {shares}")
                save_model(model, out)
    return model


def train_step(
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    labels: Tensor,
    rate: float,
    clip: float,
) -> float:
    """One optimizer step; returns the mean loss over labelled tokens."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    logits = model(ids).logits
    loss = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return float(loss.detach())


def main() -> None:
    """Command line: every field of the recipe is a flag."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="directory of the initial weights")
    defaults = NanoRecipe()
    for name in NanoRecipe.__slots__:
        default = getattr(defaults, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default)
    args = vars(parser.parse_args())
    out, start = args.pop("out"), args.pop("start")
    train(NanoRecipe(**args), out, start)


if __name__ == "__main__":
    main()
