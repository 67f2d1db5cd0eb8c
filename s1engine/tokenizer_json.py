"""The tokenizer of a model directory from its JSON files alone, where they say all of it.

transformers needs two seconds to import, and for most models it loads tokenizer.json as it is. This
file knows when: ``read_tokenizer_json`` returns None where transformers would build other rules or
add tokens. The tests compare both ways. Executes no code of the directory.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.models import BPE

from s1engine.errors import ModelError
from s1engine.model_files import TEMPLATES, read_json, read_text

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that tokenizer_config.json may name."""
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Values of tokenizer_class for which transformers loads tokenizer.json as it is."""
_LLAMA = "LlamaTokenizer"
"""The same if tokenizer.json is byte-level."""
_QWEN2, _QWEN2_TYPE = "Qwen2Tokenizer", "qwen2"
"""tokenizer_class and model_type of Qwen2: its rules hold whatever tokenizer.json says."""
_QWEN2_DEFAULTS = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
QWEN2_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # the end of a contraction
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with the character before it
        r"\p{N}",  # one digit
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # signs, with the ends of lines after them
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # blanks; the last one belongs to the word that follows
        r"\s+",
    )
)
_OTHER_RULES = (
    *("mistral", "mixtral", "ministral", "pixtral", "voxtral"),
    *("qwen3_5", "qwen4", "siglip", "hyperclovax"),
)
"""Beginnings of ``model_type`` for which transformers has rules of its own."""
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")

Parts = tuple[tokenizers.Tokenizer, dict[str, str], dict[str, str]]
"""The tokenizer, chat templates by name, and special tokens by name."""


def read_tokenizer_json(path: Path) -> Parts | None:
    """The parts of the tokenizer of directory ``path``; None if its files do not suffice, or are
    damaged. Raises ModelError for a file that is no JSON object, or no text."""
    try:
        config = _read_object(path / "tokenizer_config.json")
        model = _read_object(path / "config.json")
        if "added_tokens_decoder" not in config:
            if (path / "added_tokens.json").exists():
                return None
            config |= _read_object(path / "special_tokens_map.json")
        declared, model_type = config.get("tokenizer_class"), str(model.get("model_type"))
        if model_type.startswith(_OTHER_RULES) or (path / "tekken.json").exists():
            return None
        is_qwen2 = _QWEN2 in (declared, str(declared).removesuffix("Fast"))
        is_qwen2 = is_qwen2 or model_type == _QWEN2_TYPE
        is_llama = str(declared).removesuffix("Fast") == _LLAMA
        if not is_qwen2 and not is_llama and declared not in _PLAIN_CLASSES:
            return None
        backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        if is_qwen2 or is_llama:
            if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
                return None
            if is_qwen2 and not _set_qwen2_rules(backend):
                return None
        named = _named_tokens({**(_QWEN2_DEFAULTS if is_qwen2 else {}), **config})
        if named is None or not _adds_nothing(backend, config, named.values()):
            return None
        return backend, _templates(path, config), named
    except ModelError:
        raise
    except Exception:  # tokenizers raises plain Exception; the slow way reports what is wrong
        return None


def _set_qwen2_rules(backend: tokenizers.Tokenizer) -> bool:
    """Gives ``backend`` Qwen2's way to split text. False if its merges follow other rules."""
    model = backend.model
    if not isinstance(model, BPE) or model.unk_token is not None or model.byte_fallback:
        return False
    if model.ignore_merges or model.fuse_unk or model.dropout is not None:
        return False
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    return True


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``; an empty one if there is no such file."""
    return read_json(file) if file.exists() else {}


def _named_tokens(config: dict[str, Any]) -> dict[str, str] | None:
    """The special tokens by name; None if there are others than NAMED."""
    named: dict[str, str] = {}
    for key, value in config.items():
        if not key.endswith("_token") or value is None or isinstance(value, bool):
            continue
        if key not in NAMED:
            return None
        named[key] = _content(value)
    return named


def _content(token: Any) -> str:
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"{token!r} is no token")
    return text


def _adds_nothing(
    backend: tokenizers.Tokenizer, config: dict[str, Any], named: Iterable[str]
) -> bool:
    """Does tokenizer_config.json leave the tokens of ``backend`` and their rules as they are?"""
    if "auto_map" in config or config.get("add_prefix_space") or config.get("split_special_tokens"):
        return False
    own = backend.get_added_tokens_decoder()
    for token_id, token in config.get("added_tokens_decoder", {}).items():
        same = own.get(int(token_id))
        if same is None or same.content != token["content"]:
            return False
        if any(getattr(same, flag) != token.get(flag, False) for flag in _FLAGS):
            return False
    extra = [config.get(f"{kind}_special_tokens") or [] for kind in ("extra", "additional")]
    if not all(isinstance(tokens, list) for tokens in extra):
        return False
    special = {token.content for token in own.values() if token.special}
    return special.issuperset([*named, *(_content(token) for tokens in extra for token in tokens)])


def _templates(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name: those of template files, else those of the config."""
    files = {"default": path / "chat_template.jinja"}
    files |= {file.stem: file for file in (path / TEMPLATES).glob("*.jinja")}
    templates = {name: read_text(file) for name, file in files.items() if file.exists()}
    own = config.get("chat_template")
    if templates or own is None:
        return templates
    if isinstance(own, str):
        return {"default": own}
    return {entry["name"]: entry["template"] for entry in own}
