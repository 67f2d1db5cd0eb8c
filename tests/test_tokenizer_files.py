"""Tokenizers as transformers loads them: from JSON files alone, added tokens, lost spaces,
templates by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from s1engine.config import BUNDLED_MODEL
from s1engine.errors import ModelError, RequestError
from s1engine.gguf_file import SUFFIX
from s1engine.gguf_tokenizer import read_gguf_tokenizer
from s1engine.tokenizer import Tokenizer
from s1engine.tokenizer_files import PROBE, TokenizerFiles
from s1engine.tokenizer_json import read_tokenizer_json
from tests.gguf_files import NUM_TOKENS, write_gguf
from tests.real_model import real_model_file
from tests.tiny_models import make_model
from tests.tiny_tokenizer import CHATML, TEMPLATE, make_backend

BOS, _, EOS = CHATML
KINDS = ("plain", "processor", "add_bos_token", "no_bos_token", "bos_and_eos", "metaspace")


def metaspace() -> Backend:
    """A vocabulary in SentencePiece's style, with bytes as a fallback, as Llama-2 has."""
    vocabulary = {"<unk>": 0, BOS: 1, EOS: 2}
    vocabulary |= {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    vocabulary |= {word: 259 + i for i, word in enumerate(["▁", "a", "b", "▁a"])}
    model = models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(" ", 1, 0)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens([BOS, EOS])
    return backend


def save(path: Path, backend: Backend, **config: Any) -> Path:
    """Write a model directory with further fields of tokenizer_config.json."""
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, chat_template=TEMPLATE
    ).save_pretrained(path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return path


def save_kind(path: Path, kind: str) -> Path:
    backend = metaspace() if kind == "metaspace" else make_backend()
    if kind not in ("plain", "add_bos_token"):
        ids = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
        single = f"{BOS} $A {EOS}" if kind == "bos_and_eos" else f"{BOS} $A"
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    config: dict[str, dict[str, Any]] = {
        "add_bos_token": {"add_bos_token": True},
        "no_bos_token": {"add_bos_token": False},
        "metaspace": {"tokenizer_class": "LlamaTokenizer"},
    }
    return save(path, backend, **config.get(kind, {}))


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The engine's tokenizer, and transformers'."""
    path = save_kind(tmp_path_factory.mktemp("kind"), request.param)
    return request.param, Tokenizer.from_dir(path), transformers.AutoTokenizer.from_pretrained(path)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(text=texts)
def test_raw_prompts_are_encoded_as_by_transformers(pair: Any, text: str) -> None:
    kind, tokenizer, oracle = pair
    ids = tokenizer.encode_prompt(text)
    assert ids == oracle(text).input_ids
    if kind in ("processor", "bos_and_eos", "metaspace"):
        assert ids[0] == oracle.bos_token_id
    if kind == "plain":
        assert ids == tokenizer.encode(text)


@given(text=texts)
def test_chats_get_no_second_beginning_of_text(pair: Any, text: str) -> None:
    _, tokenizer, oracle = pair
    chat = [{"role": "user", "content": text}]
    expected = oracle.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    rendered = tokenizer.render_chat(chat)
    assert tokenizer.encode(rendered) == expected
    whole = tokenizer.encode_prompt(BOS + rendered)  # a client may render the chat by itself
    assert whole.count(oracle.bos_token_id) == 1 + text.count(BOS)


def test_lone_surrogates_in_prompts_are_the_users_error(pair: Any) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        pair[1].encode_prompt("a\ud800")


def test_the_end_of_text_is_known(pair: Any) -> None:
    assert pair[1].eos_token_id == pair[2].eos_token_id


# --- JSON files alone ---


ADDED = ("<think>", "</think>", "<tool>")


def same_as_slow(path: Path) -> None:
    """Asserts that the files alone give what transformers gives."""
    parts = (read_gguf_tokenizer if path.suffix == SUFFIX else read_tokenizer_json)(path)
    assert parts is not None, "the files suffice"
    fast, slow = TokenizerFiles(*parts), TokenizerFiles.read_by_transformers(path)
    assert fast.special_tokens == slow.special_tokens
    assert fast.templates == slow.templates
    assert fast.backend.get_vocab() == slow.backend.get_vocab()
    own, other = (files.backend.get_added_tokens_decoder() for files in (fast, slow))
    assert {i: (str(t), t.special) for i, t in own.items()} == {
        i: (str(t), t.special) for i, t in other.items()
    }
    quick = Tokenizer(fast.backend, fast.templates, fast.special_tokens)
    oracle = Tokenizer(slow.backend, slow.templates, slow.special_tokens)
    assert quick.eos_token_id == oracle.eos_token_id
    for text in (PROBE, "", BOS + "a", f" {EOS} b", "x" + "".join(ADDED), "\n\n a"):
        ids = quick.encode(text)
        assert ids == oracle.encode(text)
        assert quick.encode_prompt(text) == oracle.encode_prompt(text)
        for skips in (True, False):
            assert quick.decode(ids, skips) == oracle.decode(ids, skips)


def test_the_bundled_models_files_suffice() -> None:
    same_as_slow(BUNDLED_MODEL)


def test_a_real_gguf_files_tokenizer_needs_no_transformers() -> None:
    same_as_slow(real_model_file())


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2"])
@pytest.mark.parametrize("ends", [{}, {"add_bos_token": True}, {"add_eos_token": True}], ids=str)
def test_tokenizers_of_gguf_files(tmp_path: Path, pre: str, ends: dict[str, bool]) -> None:
    model = make_model(tmp_path / "model", "llama", vocab_size=NUM_TOKENS)
    fields = {f"tokenizer.ggml.{key}": value for key, value in {**ends, "pre": pre}.items()}
    fields["tokenizer.ggml.bos_token_id"] = 3
    file = write_gguf(tmp_path / "x.gguf", model, fields=fields)
    if read_gguf_tokenizer(file) is None:
        pytest.fail("the file suffices")
    same_as_slow(file)


@pytest.mark.parametrize("kind", KINDS)
def test_files_alone_give_what_transformers_gives(tmp_path: Path, kind: str) -> None:
    path = save_kind(tmp_path, kind)
    if kind == "metaspace":  # transformers builds Llama's rules
        assert read_tokenizer_json(path) is None
    else:
        same_as_slow(path)


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("listed", [False, True])
def test_declared_classes_and_added_tokens(tmp_path: Path, name: str, listed: bool) -> None:
    backend = make_backend(visible=ADDED)
    added = {
        str(i): {"content": token.content, "special": token.special, "normalized": token.normalized}
        for i, token in backend.get_added_tokens_decoder().items()
    }
    path = save(tmp_path, backend, tokenizer_class=name)
    if listed:
        path = save(tmp_path, backend, tokenizer_class=name, added_tokens_decoder=added)
    else:
        (path / "special_tokens_map.json").write_text(json.dumps({"pad_token": CHATML[1]}))
    same_as_slow(path)


@pytest.mark.parametrize("name", ["Qwen2TokenizerFast", "PreTrainedTokenizerFast"])
def test_qwen2_has_its_own_split_of_text(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, make_backend(), tokenizer_class=name, pad_token=BOS)
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    same_as_slow(path)


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "BertTokenizer"},
        {"tokenizer_class": None},
        {"eos_token": "<not there>"},
        {"image_token": BOS},
        {"extra_special_tokens": ["<not there>"]},
        {"added_tokens_decoder": {"0": {"content": "!", "special": True}}},
        {"add_prefix_space": True},
        {"auto_map": {"AutoTokenizer": ["a.B", None]}},
    ],
    ids=str,
)
def test_files_that_do_not_suffice_go_through_transformers(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    assert read_tokenizer_json(save(tmp_path, make_backend(), **config)) is None


def test_a_damaged_tokenizer_is_reported_by_the_slow_way(tmp_path: Path) -> None:
    path = save(tmp_path, make_backend())
    (path / "tokenizer.json").write_text("{")
    assert read_tokenizer_json(path) is None
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        Tokenizer.from_dir(path)


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, make_backend())
    (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: cannot be read as JSON"):
        Tokenizer.from_dir(path)


# --- spaces that transformers loses ---


def as_llama(path: Path) -> Any:
    """The tokenizer of a directory with Llama's rules for spaces, as transformers 5.17 loads it."""
    content = json.loads((path / "tokenizer.json").read_text())
    merges = [tuple(merge) for merge in content["model"]["merges"]]
    added = {
        token["id"]: AddedToken(token["content"], special=token["special"])
        for token in content["added_tokens"]
    }
    return transformers.LlamaTokenizer(
        vocab=content["model"]["vocab"],
        merges=merges,
        unk_token=None,
        bos_token=BOS,
        eos_token=EOS,
        added_tokens_decoder=added,
    )


def test_a_byte_level_tokenizer_may_be_declared_as_llamas(tmp_path: Path) -> None:
    """Whatever version of transformers is installed."""
    path = save(tmp_path, make_backend(), tokenizer_class="LlamaTokenizerFast")
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = Tokenizer.from_dir(path)
    assert tokenizer.encode(PROBE) == make_backend().encode(PROBE).ids
    assert tokenizer.decode(tokenizer.encode(PROBE)) == PROBE


def test_lost_spaces_are_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, make_backend(), add_bos_token=True, tokenizer_class="Unknown")
    wrong = as_llama(path)
    assert wrong.decode(wrong.encode(PROBE, add_special_tokens=False)) != PROBE
    right = Tokenizer.from_dir(path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: wrong)
    repaired = Tokenizer.from_dir(path)
    for text in (PROBE, " a  b ", "x" + CHATML[1] + "y"):
        assert repaired.encode(text) == right.encode(text)
        assert repaired.encode_prompt(text) == right.encode_prompt(text)
        assert repaired.decode(repaired.encode(text), skip_special_tokens=False) == text


def test_what_cannot_be_restored_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, make_backend(), tokenizer_class="Unknown")
    wrong = as_llama(path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: wrong)
    file = path / "tokenizer.json"
    own = Backend.from_file(str(file))
    wrong.add_tokens(["<only here>"])
    wrong.add_tokens(["<and here>"])
    own.add_tokens(["<and here>"])  # has the other's id
    own.save(str(file))
    with pytest.raises(ModelError, match="<only here>"):
        TokenizerFiles.read(path)
    own.normalizer = normalizers.Lowercase()
    own.save(str(file))
    with pytest.raises(ModelError, match=r"tokenizer\.json: loses text"):
        TokenizerFiles.read(path)


def test_a_tokenizer_that_changes_text_by_design_is_loaded(tmp_path: Path) -> None:
    backend = make_backend()
    backend.normalizer = normalizers.Lowercase()
    path = save(tmp_path, backend)
    assert Tokenizer.from_dir(path).encode("ABC") == backend.encode("abc").ids


# --- templates ---


@pytest.mark.parametrize("form", ["config", "files"])
def test_templates_by_name_are_those_of_transformers(tmp_path: Path, form: str) -> None:
    templates = {"default": TEMPLATE, "tool_use": "{{ tools | tojson }}" + TEMPLATE, "x": "{% y"}
    path = save(tmp_path, make_backend())
    if form == "config":
        (path / "chat_template.jinja").unlink(missing_ok=True)
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        file = path / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": listed}))
    else:
        (path / "chat_template.jinja").write_text(templates.pop("default"))
        (path / "additional_chat_templates").mkdir()
        for name, text in templates.items():
            (path / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    tokenizer = Tokenizer.from_dir(path)
    oracle = transformers.AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": "x"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for tools in ([], [tool]):
        expected = oracle.apply_chat_template(
            chat, tools=tools or None, add_generation_prompt=True, tokenize=False
        )
        assert tokenizer.render_chat(chat, tools=tools) == expected


def test_a_broken_template_of_a_model_names_directory_and_line(tmp_path: Path) -> None:
    path = save(tmp_path, make_backend())
    (path / "chat_template.jinja").write_text("a\nb\n{% loop x in y %}")
    with pytest.raises(ModelError, match=f"{path}: chat_template line 3"):
        Tokenizer.from_dir(path)


def test_without_a_default_template_chats_are_refused() -> None:
    tokenizer = Tokenizer(make_backend(), {"tool_use": "{{ tools }}"})
    with pytest.raises(RequestError, match="none named default"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])
