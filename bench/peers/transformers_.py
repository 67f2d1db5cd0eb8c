"""transformers: ``generate`` over a batch padded on the left."""

from pathlib import Path

from .protocol import Generate, Ids, Setup

PACKAGE = "transformers"
PAD = 0


def convert(source: Path, target: Path, precision: str) -> None:
    """Nothing: the directory is read as it is."""
    if precision != "bf16":
        raise ValueError(f"{precision} on a CPU is not what transformers offers by itself")
    target.symlink_to(source.resolve())


def padded(prompts: list[Ids]) -> tuple[list[Ids], list[Ids]]:
    """Rows of one length, and which of their places count."""
    length = max(map(len, prompts))
    gaps = [length - len(prompt) for prompt in prompts]
    rows = [[PAD] * gap + prompt for gap, prompt in zip(gaps, prompts, strict=True)]
    return rows, [[0] * gap + [1] * (length - gap) for gap in gaps]


def load(target: Path, setup: Setup) -> Generate:
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
        found: list[Ids] = ids[:, len(rows[0]) :].tolist()
        return found

    return generate
