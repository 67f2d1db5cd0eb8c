"""A byte-level tokenizer of a few hundred tokens, in memory and as files of a model directory. It
encodes any text, and many ids are parts of characters."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from s1engine import tokenizer as s1_tokenizer

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = "system user assistant think answer Wait Final Answer the quick brown fox é ü 你好 🙂 \n\n"


def make_backend(
    special: tuple[str, ...] = CHATML, visible: tuple[str, ...] = (), size: int = 320
) -> Tokenizer:
    """Bytes, a few merges, then ``special`` tokens and ``visible`` added ones."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS], trainer)
    backend.add_tokens([AddedToken(token, special=True) for token in special])
    backend.add_tokens([AddedToken(token, special=False) for token in visible])
    return backend


def make_tokenizer(
    special: tuple[str, ...] = CHATML,
    visible: tuple[str, ...] = (),
    template: str | None = TEMPLATE,
) -> s1_tokenizer.Tokenizer:
    """The engine's tokenizer over ``make_backend``."""
    return s1_tokenizer.Tokenizer(make_backend(special, visible), template)


def save_tokenizer(path: Path, special: tuple[str, ...] = CHATML, size: int = 320) -> int:
    """Writes the files of a model directory; returns the number of tokens."""
    backend = make_backend(special, size=size)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[-1], chat_template=TEMPLATE
    ).save_pretrained(path)
    return backend.get_vocab_size()
