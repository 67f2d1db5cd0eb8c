"""Reasoning formats: token ids on real and tiny vocabularies, detection, open thinking."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.config import BUNDLED_MODEL
from s1engine.errors import RequestError
from s1engine.reasoning import ReasoningFormat, detect_format, find_open_thinking
from s1engine.tokenizer import Tokenizer
from tests.shared_data import shared_file
from tests.tiny_tokenizer import CHATML, make_tokenizer

TINY_S1 = make_tokenizer()
TINY_TAGS = make_tokenizer(visible=("<think>", "</think>"))
IM_START, IM_END = 151644, 151645
EOS = (IM_END, 151643)


@pytest.fixture(scope="module")
def qwen25() -> Tokenizer:
    return Tokenizer.from_dir(shared_file("tokenizer/qwen2.5"))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("qwen3")
    for name in ("qwen2.5/vocab.json", "qwen2.5/merges.txt", "qwen3/tokenizer_config.json"):
        shutil.copy(shared_file(f"tokenizer/{name}"), path)
    return Tokenizer.from_dir(path)


def _format(tokenizer: Tokenizer, eos: tuple[int, ...], requested: str = "auto") -> ReasoningFormat:
    fmt = detect_format(tokenizer, eos, requested)
    assert fmt is not None
    return fmt


# --- ids ---


def test_s1_on_qwen25(qwen25: Tokenizer) -> None:
    facts = json.loads(shared_file("tokenizer/s1_chat_format.json").read_text())
    fmt = _format(qwen25, EOS)
    assert fmt.name == "s1"
    assert fmt.start == (IM_START, 26865)
    assert list(fmt.start) == qwen25.encode(facts["thinking_start"])
    assert set(fmt.triggers) == {IM_START, IM_END, 151643}
    assert fmt.natural_end == (IM_START, 9217)
    assert list(fmt.natural_end) == qwen25.encode(facts["thinking_end_delimiter"])
    assert fmt.newline == (198,)
    assert not fmt.newline_always
    assert fmt.forced_end() == (IM_START, 9217, 198, 19357, 21806, 25)
    assert fmt.forced_end("") == fmt.natural_end
    assert qwen25.decode(fmt.forced_end("So:"), False) == "<|im_start|>answer\nSo:"


def test_think_tags_on_qwen3(qwen3: Tokenizer) -> None:
    fmt = _format(qwen3, EOS)
    assert fmt.name == "think-tag"
    assert fmt.start == (151667, 198)
    assert set(fmt.triggers) == {151668, *EOS}
    assert fmt.natural_end == (151668,)
    assert fmt.newline == (198,)
    assert fmt.newline_always
    assert fmt.forced_end() == (151668, 271)
    assert qwen3.decode(fmt.forced_end("So:"), False) == "</think>\n\nSo:"


def test_s1_can_be_asked_of_qwen3(qwen3: Tokenizer) -> None:
    assert _format(qwen3, EOS, "s1").start == (IM_START, 26865)


@pytest.mark.parametrize("tokenizer", [TINY_S1, TINY_TAGS], ids=["s1", "think-tag"])
@given(final=st.none() | st.text("ab :\n", max_size=8))
def test_ids_spell_the_format(tokenizer: Tokenizer, final: str | None) -> None:
    fmt = _format(tokenizer, (0,))

    def text(ids: tuple[int, ...]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    if fmt.name == "s1":
        tail = "\nFinal Answer:" if final is None else final and "\n" + final
        assert text(fmt.start) == "<|im_start|>think"
        assert text(fmt.forced_end(final)) == "<|im_start|>answer" + tail
    else:
        assert text(fmt.start) == "<think>\n"
        assert text(fmt.forced_end(final)) == "</think>\n\n" + (final or "")
    assert text(fmt.newline) == "\n"
    assert fmt.forced_end(final) == tuple(tokenizer.encode(text(fmt.forced_end(final))))


def test_the_bundled_model() -> None:
    tokenizer = Tokenizer.from_dir(BUNDLED_MODEL)
    eos = json.loads((BUNDLED_MODEL / "generation_config.json").read_text())["eos_token_id"]
    fmt = _format(tokenizer, (eos,))
    assert fmt.name == "s1"
    assert eos in fmt.triggers
    chat = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "1 + 2"}]))
    assert find_open_thinking(chat, fmt) is None
    assert find_open_thinking([*chat, *fmt.start], fmt) == len(chat) + len(fmt.start)


# --- detection ---


def test_auto_finds_the_format_or_none() -> None:
    assert _format(TINY_S1, ()).name == "s1"
    assert _format(TINY_TAGS, ()).name == "think-tag"
    assert detect_format(make_tokenizer(special=("<s>",)), ()) is None
    assert detect_format(make_tokenizer(special=("<s>",), visible=("</think>",)), ()) is None


def test_none_switches_off() -> None:
    assert detect_format(TINY_TAGS, (), "none") is None


@pytest.mark.parametrize(("requested", "lacks"), [("think-tag", "<think>"), ("s1", "<|im_start|>")])
def test_missing_delimiters_are_named(requested: str, lacks: str) -> None:
    bare = make_tokenizer(special=("<s>",))
    with pytest.raises(RequestError, match="single token") as raised:
        detect_format(bare, (), requested)
    assert lacks in str(raised.value)
    assert raised.value.param == "reasoning_format"


# --- open thinking ---


def test_open_thinking_of_s1() -> None:
    fmt = _format(TINY_S1, (TINY_S1.single_token_id(CHATML[2]) or 0,))
    header = "<|im_start|>user\nquick<|im_end|>\n<|im_start|>assistant\n"

    def begin(text: str) -> int | None:
        return find_open_thinking(TINY_S1.encode(header + text), fmt)

    after = len(TINY_S1.encode(header + "<|im_start|>think"))
    assert begin("") is None
    assert begin("<|im_start|>think") == after
    assert begin("<|im_start|>think\nthe quick") == after
    assert begin("<|im_start|>think\nthe<|im_start|>answer\n") is None
    assert begin("<|im_start|>think\nthe<|im_start|>answer\nfox<|im_end|>\n") is None
    again = "<|im_start|>think\nthe<|im_start|>answer\n"
    assert begin(again + "<|im_start|>think\n") == len(
        TINY_S1.encode(header + again + "<|im_start|>think")
    )


def test_open_thinking_of_think_tags() -> None:
    fmt = _format(TINY_TAGS, (TINY_TAGS.single_token_id(CHATML[2]) or 0,))
    header = "<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\n"

    def begin(text: str) -> int | None:
        return find_open_thinking(TINY_TAGS.encode(header + text), fmt)

    after = len(TINY_TAGS.encode(header + "<think>"))
    assert begin("") is None
    assert begin("<think>") == after
    assert begin("<think>the") == after
    assert begin("<think>\nthe") == after + 1  # the newline belongs to the start
    assert begin("<think>\n\n</think>\n\n") is None
    quoted = "<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n"
    assert find_open_thinking(TINY_TAGS.encode(quoted), fmt) is None


def _by_scanning_forward(prompt: list[int], fmt: ReasoningFormat) -> int | None:
    """The definition: a marker opens, any trigger that begins no marker closes."""
    begin: int | None = None
    for i, token in enumerate(prompt):
        if tuple(prompt[i : i + len(fmt.open_marker)]) == fmt.open_marker:
            whole = tuple(prompt[i : i + len(fmt.start)]) == fmt.start
            begin = i + (len(fmt.start) if whole else len(fmt.open_marker))
        elif token in fmt.triggers:
            begin = None
    return begin


@pytest.mark.parametrize("tokenizer", [TINY_S1, TINY_TAGS], ids=["s1", "think-tag"])
@given(data=st.data())
def test_open_thinking_by_definition(tokenizer: Tokenizer, data: st.DataObject) -> None:
    fmt = _format(tokenizer, (0,))
    pieces = [fmt.start, fmt.open_marker, fmt.natural_end, fmt.newline, fmt.triggers]
    pieces.append((7,))
    drawn = data.draw(st.lists(st.sampled_from(pieces), max_size=8))
    prompt = [token for piece in drawn for token in piece]
    assert find_open_thinking(prompt, fmt) == _by_scanning_forward(prompt, fmt)
