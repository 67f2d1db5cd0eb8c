"""The tokenizer of a GGUF file, as transformers builds it from the metadata.

Owns what transformers leaves out: the splits of text that it does not know. transformers would fall
back to GPT-2's split without a word, and give other ids than the model was trained with.
"""

from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from s1engine.gguf_file import GgufFile

_BYTE_LEVEL = "gpt2"  # tokenizer.ggml.model of byte-level vocabularies
_GPT2_SPLITS = ("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling")
"""Values of tokenizer.ggml.pre that mean GPT-2's own split, which transformers falls back to."""
_DIGIT_SPLITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
"""The same, but every digit is a piece of its own."""


def load_gguf_tokenizer(path: Path) -> Any:
    """transformers' fast tokenizer of the file alone: no other file of its folder is read.

    Raises ModelError about the file, or any error of transformers' parsers.
    """
    from transformers import PreTrainedTokenizerFast

    file = GgufFile(path)  # transformers' parser trusts the counts in a file; this one does not
    loaded: Any = PreTrainedTokenizerFast(name_or_path=str(path.parent), gguf_file=path.name)
    if file.metadata.get("tokenizer.ggml.model") == _BYTE_LEVEL:
        _complete_split(file, loaded.backend_tokenizer)
    return loaded


def _complete_split(file: GgufFile, backend: Any) -> None:
    """Gives ``backend`` the split of the file's ``tokenizer.ggml.pre``."""
    key = "tokenizer.ggml.pre"
    pre = file.metadata.get(key)
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return  # transformers knows it
    if pre in _DIGIT_SPLITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    elif pre not in _GPT2_SPLITS:
        raise file.error(key, f"{pre!r} is not supported: nothing here knows how it splits text")
