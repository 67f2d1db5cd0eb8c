"""transformers: ``generate`` over a batch padded on the left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s1engine.bench.cpu_adapter import EngineSetup, Generate, Ids

PACKAGE = "transformers"
PAD = 0


def convert(source: Path, target: Path, precision: str) -> None:
    """Link the directory: transformers reads it as it is."""
    if precision != "bf16":
        raise ValueError(f"transformers alone has no {precision} on a CPU")
    target.symlink_to(source.resolve())


def padded(prompts: list[Ids]) -> tuple[list[Ids], list[Ids]]:
    """Rows of equal length, padded on the left, and their attention mask."""
    length = max(map(len, prompts))
    gaps = [length - len(prompt) for prompt in prompts]
    rows = [[PAD] * gap + prompt for gap, prompt in zip(gaps, prompts, strict=True)]
    return rows, [[0] * gap + [1] * (length - gap) for gap in gaps]


def load(target: Path, setup: EngineSetup) -> Generate:
    """The model in bf16 with torch's own attention."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(setup.threads)
    model = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()

    def generate(prompts: list[Ids], new: int) -> list[Ids]:
        rows, mask = padded(prompts)
        with torch.inference_mode():
            ids = model.generate(
                torch.tensor(rows),
                attention_mask=torch.tensor(mask),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=PAD,
            )
        outputs: list[Ids] = ids[:, len(rows[0]) :].tolist()
        return outputs

    return generate
