"""The tokenizer of a GGUF file: built here where it is byte-level, else by transformers.

Owns what transformers leaves out: the splits of text that it does not know. transformers would fall
back to GPT-2's split without a word, and give other ids than the model was trained with.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from s1engine.gguf_file import GgufFile, open_gguf
from s1engine.tokenizer_json import QWEN2_SPLIT, Parts

_BYTE_LEVEL = "gpt2"  # tokenizer.ggml.model of byte-level vocabularies
_GPT2_SPLITS = ("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling")
"""Values of tokenizer.ggml.pre that mean GPT-2's own split, which transformers falls back to."""
_DIGIT_SPLITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
"""The same, but every digit is a piece of its own."""
_QWEN2_SPLITS = ("qwen2", "deepseek-r1-qwen")
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_ALWAYS_SPECIAL = "<|endoftext|>"


def read_gguf_tokenizer(path: Path) -> Parts | None:
    """The parts of a byte-level tokenizer, equal to those of transformers; None if it is of another
    kind. Raises ModelError about the file."""
    file = open_gguf(path)
    fields = {key.removeprefix("tokenizer.ggml."): key for key in file.metadata}
    if file.metadata.get("tokenizer.ggml.model") != _BYTE_LEVEL:
        return None
    split = _split(file.metadata.get("tokenizer.ggml.pre"))
    if split is None or not {"tokens", "merges", "token_type"} <= set(fields):
        return None
    tokens, kinds, pairs = (file.array(fields[key]) for key in ("tokens", "token_type", "merges"))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in pairs]
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    regular = all(isinstance(token, str) and letters.issuperset(token) for token in tokens)
    if not regular or len(vocabulary) < len(tokens) or len(kinds) != len(tokens):
        return None
    named = _named_tokens(file, tokens)
    if named is None or _ALWAYS_SPECIAL not in vocabulary or any(len(m) != 2 for m in merges):
        return None
    try:
        backend = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False))
    except Exception as error:  # tokenizers raises plain Exception
        raise file.error(fields["merges"], f"do not fit the tokens: {error}") from error
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    of_kind = {kind: [t for t, own in zip(tokens, kinds, strict=True) if own == kind]
               for kind in (_CONTROL, _USER_DEFINED)}  # fmt: skip
    plain = set(of_kind[_USER_DEFINED]) - {_ALWAYS_SPECIAL}
    special = [_ALWAYS_SPECIAL, *of_kind[_CONTROL], *(t for t in named.values() if t not in plain)]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in sorted(plain)])
    _add_ends(file, backend, named)
    template = file.metadata.get("tokenizer.chat_template")
    return backend, {"default": template} if isinstance(template, str) else {}, named


def _named_tokens(file: GgufFile, tokens: list[str]) -> dict[str, str] | None:
    """The special tokens by name; None if an id is not one of ``tokens``."""
    named = {}
    for name, key in _NAMED.items():
        token_id = file.metadata.get(f"tokenizer.ggml.{key}")
        if token_id is None:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            return None
        named[name] = tokens[token_id]
    return named


def _add_ends(file: GgufFile, backend: Tokenizer, named: dict[str, str]) -> None:
    """Adds the beginning and the end of a text to encoded prompts, where the file says so."""
    before, after = (
        named.get(f"{end}_token") if file.metadata.get(f"tokenizer.ggml.add_{end}_token") else None
        for end in ("bos", "eos")
    )
    single = [*([before] if before else []), "$A", *([after] if after else [])]
    ids = [(token, backend.token_to_id(token)) for token in (before, after) if token]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def _split(pre: Any) -> Any:
    """How text of the kind ``tokenizer.ggml.pre`` is split; None if transformers must know."""
    if pre in _GPT2_SPLITS:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _DIGIT_SPLITS:
        first: Any = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if pre in _QWEN2_SPLITS:
        first = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([first, letters])
    return None


def load_gguf_tokenizer(path: Path) -> Any:
    """transformers' fast tokenizer of the file alone: no other file of its folder is read.

    Raises ModelError about the file, or any error of transformers' parsers.
    """
    from transformers import PreTrainedTokenizerFast

    file = open_gguf(path)  # transformers' parser trusts the counts in a file; this one does not
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
