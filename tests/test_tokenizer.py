"""Tokenizer: golden data, round trips, incremental decoding against whole decoding, loading."""

import contextlib
import json
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from s1engine.errors import ModelError, RequestError
from s1engine.tokenizer import MAX_WINDOW, REPLACEMENT, IncrementalDetokenizer, Tokenizer
from tests.shared_data import shared_file
from tests.tiny_tokenizer import make_backend, make_tokenizer, save_tokenizer

TINY = make_tokenizer(visible=("<tool_call>", "added with space"))


def _byte_fallback() -> Tokenizer:
    """A vocabulary as in SentencePiece: words with a leading mark, and bytes as a fallback."""
    words = ["▁", "▁a", "▁b", "c", "é", "\n", "▁你"]
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    vocabulary |= {word: 257 + i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend)


FALLBACK = _byte_fallback()


@pytest.fixture(scope="session")
def qwen() -> Tokenizer:
    return Tokenizer.from_dir(shared_file("tokenizer/qwen2.5"))


def _jsonl(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in shared_file(name).read_text("utf-8").splitlines()]


# --- golden data ---


def test_golden_encodings(qwen: Tokenizer) -> None:
    rows = _jsonl("tokenizer/qwen2.5/golden_encodings.jsonl")
    assert len(rows) > 200
    for row in rows:
        assert qwen.encode(row["text"]) == row["ids"], row["text"]


def test_golden_chats(qwen: Tokenizer) -> None:
    rows = [r for r in _jsonl("tokenizer/qwen2.5/golden_chat.jsonl") if r["add_generation_prompt"]]
    assert len(rows) >= 4
    for row in rows:
        assert qwen.encode(qwen.render_chat(row["messages"])) == row["ids"]
        assert qwen.decode(row["ids"], skip_special_tokens=False) == row["text"]


def test_qwen_ids(qwen: Tokenizer) -> None:
    assert qwen.num_tokens == 151665
    assert qwen.single_token_id("<|im_start|>") == 151644
    assert qwen.single_token_id("<|im_end|>") == 151645
    assert qwen.encode("<|im_start|>think") == [151644, 26865]
    assert qwen.encode("Wait") == [14190]
    assert qwen.single_token_id("no such token") is None


def test_qwen_newlines(qwen: Tokenizer) -> None:
    ids = set(qwen.newline_ids)
    assert qwen.newline_ids == sorted(ids)
    assert set(qwen.encode("\n") + qwen.encode(".\n\n")[-1:]) <= ids
    assert not ids & set(qwen.encode("a b\tc"))
    for token_id in qwen.newline_ids[::50]:
        assert qwen.decode([token_id]).endswith("\n")
        assert qwen.token_bytes(token_id).endswith(b"\n")


# --- round trips ---

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@given(texts)
def test_round_trip(text: str) -> None:
    assert TINY.decode(TINY.encode(text), skip_special_tokens=False) == text


@settings(max_examples=50)
@given(texts)
def test_bytes_of_tokens_join_to_the_text(text: str) -> None:
    ids = TINY.encode(text)
    assert b"".join(map(TINY.token_bytes, ids)).decode() == text


def test_special_strings_become_special_tokens() -> None:
    ids = TINY.encode("<|im_start|>user")
    assert ids[0] == TINY.single_token_id("<|im_start|>")
    assert TINY.decode(ids) == "user"
    assert TINY.decode(ids, skip_special_tokens=False) == "<|im_start|>user"
    assert TINY.token_bytes(ids[0]) == b"<|im_start|>"
    assert TINY.visible_bytes[ids[0]] == b""
    assert TINY.is_special(ids[0]) and not TINY.is_special(ids[1])


def test_lone_surrogates_are_the_users_error() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        TINY.encode("a\ud800")


def test_ids_without_a_token_have_no_text() -> None:
    assert TINY.token_bytes(TINY.num_tokens + 5) == b""
    assert TINY.visible_bytes[TINY.num_tokens + 5] == b""


def test_encoding_lets_other_threads_run() -> None:
    """A long prompt must not stop the engine's steps. With so long a switch interval a thread runs
    only when another releases the GIL, so the watcher sees the encoding only if it releases it."""
    stage, seen = ["before"], set()

    def watch() -> None:
        while stage[0] != "after":
            seen.add(stage[0])
            time.sleep(0)

    watcher, interval = threading.Thread(target=watch), sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        watcher.start()
        stage[0] = "during"
        TINY.encode("hello world, " * 100_000)
        stage[0] = "after"
        watcher.join()
    finally:
        sys.setswitchinterval(interval)
    assert "during" in seen


# --- incremental decoding ---


def _pieces(tokenizer: Tokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    """The pieces of a stream that receives ``ids`` in groups of ``sizes``, then is flushed."""
    stream = IncrementalDetokenizer(tokenizer)
    pieces, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(stream.push(ids[at : at + size]))
        at, turn = at + size, turn + 1
    return [*pieces, stream.flush()]


group_sizes = st.lists(st.integers(1, 5), min_size=1, max_size=5)


@pytest.mark.parametrize("tokenizer", [TINY, FALLBACK], ids=["byte-level", "byte-fallback"])
@given(data=st.data())
def test_pieces_join_to_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = tokenizer.encode(data.draw(texts.filter(lambda text: REPLACEMENT not in text)))
    pieces = _pieces(tokenizer, ids, data.draw(group_sizes))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert REPLACEMENT not in "".join(pieces)


@settings(max_examples=300)
@given(st.lists(st.integers(0, TINY.num_tokens + 3), max_size=60), group_sizes)
def test_pieces_of_any_ids_join_to_the_whole(ids: list[int], sizes: list[int]) -> None:
    """Including broken characters, special tokens and ids without a token."""
    assert "".join(_pieces(TINY, ids, sizes)) == TINY.decode(ids)


def test_pieces_of_qwen_ids_join_to_the_whole(qwen: Tokenizer) -> None:
    text = "naïve café 你好、世界 🙂🏽 नमस्ते ∑ <|im_start|>think\n" * 3
    ids = qwen.encode(text)
    assert "".join(_pieces(qwen, ids, [1])) == qwen.decode(ids)


@pytest.mark.parametrize("tokenizer", [TINY, FALLBACK], ids=["byte-level", "byte-fallback"])
def test_a_split_character_waits_for_its_end(tokenizer: Tokenizer) -> None:
    stream = IncrementalDetokenizer(tokenizer)
    ids = tokenizer.encode("🐉")
    assert len(ids) > 1
    shown = [stream.push([token_id]) for token_id in ids]
    assert [piece for piece in shown if piece.strip()] == ["🐉"]
    assert stream.flush() == ""


def test_flush_shows_an_unfinished_character_once() -> None:
    stream = IncrementalDetokenizer(TINY)
    assert stream.push(TINY.encode("a🐉")[:-1]) == "a"
    assert stream.flush() == REPLACEMENT
    assert stream.flush() == ""
    assert stream.push(TINY.encode("b")) == "b"


def test_the_window_stays_short() -> None:
    """No output of a model makes the cost per token grow."""
    longest = 0
    decode_all = FALLBACK.decode

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_all(ids)

    stream = IncrementalDetokenizer(FALLBACK)
    stream._decoder._decode = decode  # type: ignore[attr-defined]
    broken = FALLBACK.encode("🐉")[-2]  # a byte that no character begins with
    invisible = FALLBACK.num_tokens - 1
    for token_id in [broken] * 300 + [invisible] * 300 + FALLBACK.encode("ab" * 200):
        stream.push([token_id])
    assert 0 < longest <= 2 * MAX_WINDOW


# --- loading ---


def test_from_dir(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    loaded, built = Tokenizer.from_dir(tmp_path), make_tokenizer()
    chat = [{"role": "user", "content": "fox é"}]
    assert loaded.render_chat(chat) == built.render_chat(chat)
    assert (loaded.num_tokens, loaded.is_byte_level) == (built.num_tokens, True)


def test_a_template_file_replaces_the_models_own(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }}|{{ eos_token }}")
    loaded = Tokenizer.from_dir(tmp_path, str(file))
    ids = loaded.encode(loaded.render_chat([{"role": "user", "content": "fox"}]))
    assert loaded.decode(ids, skip_special_tokens=False) == "fox|<|im_end|>"


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)) as raised:
        Tokenizer.from_dir(tmp_path)
    assert "\n" not in str(raised.value)
    save_tokenizer(tmp_path)
    with pytest.raises(RequestError, match=r"no\.jinja") as refused:
        Tokenizer.from_dir(tmp_path, str(tmp_path / "no.jinja"))
    assert refused.value.param == "chat_template"


def test_a_truncated_file_is_a_model_error(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        Tokenizer.from_dir(tmp_path)


def test_code_in_a_model_directory_is_never_run(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}))
    with contextlib.suppress(ModelError):
        Tokenizer.from_dir(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_qwen3_has_think_tags(qwen: Tokenizer, tmp_path: Path) -> None:
    loaded = Tokenizer.from_dir(qwen3_dir(tmp_path))
    assert loaded.single_token_id("<think>") == 151667
    assert loaded.single_token_id("</think>") == 151668
    assert qwen.single_token_id("<think>") is None


def qwen3_dir(tmp_path: Path) -> Path:
    """Qwen3's tokenizer: the vocabulary of Qwen2.5 with its own configuration."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared_file(f"tokenizer/qwen2.5/{name}"), tmp_path)
    shutil.copy(shared_file("tokenizer/qwen3/tokenizer_config.json"), tmp_path)
    return tmp_path


def test_a_regular_expression_that_panics_is_an_error_of_the_text() -> None:
    backend = make_backend()
    split = pre_tokenizers.Split(Regex("(a+)+$|(a|a)*z"), "isolated")
    backend.pre_tokenizer = split
    with pytest.raises(RequestError, match="regular expressions"):
        Tokenizer(backend, None).encode("a" * 29 + "b")
