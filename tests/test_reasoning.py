"""Reasoning formats: token ids on real and tiny vocabularies, formats of a user, open thinking."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.config import BUNDLED_MODEL, REASONING_FORMATS, EngineConfig
from s1engine.errors import RequestError
from s1engine.reasoning import ReasoningFormat, encode_format, find_open_thinking
from s1engine.reasoning_specs import FORMAT_SPECS, find_spec
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


def _format(tokenizer: Tokenizer, eos: tuple[int, ...], name: str) -> ReasoningFormat:
    return encode_format(FORMAT_SPECS[name], tokenizer, eos)


# --- ids ---


def test_s1_on_qwen25(qwen25: Tokenizer) -> None:
    facts = json.loads(shared_file("tokenizer/s1_chat_format.json").read_text())
    fmt = _format(qwen25, EOS, "s1")
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
    fmt = _format(qwen3, EOS, "think-tag")
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


@pytest.mark.parametrize(("tokenizer", "name"), [(TINY_S1, "s1"), (TINY_TAGS, "think-tag")])
@given(final=st.none() | st.text("ab :\n", max_size=8))
def test_ids_spell_the_format(tokenizer: Tokenizer, name: str, final: str | None) -> None:
    fmt = _format(tokenizer, (0,), name)

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
    fmt = _format(tokenizer, (eos,), "s1")
    assert eos in fmt.triggers
    chat = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "1 + 2"}]))
    assert find_open_thinking(chat, fmt) is None
    assert find_open_thinking([*chat, *fmt.start], fmt) == len(chat) + len(fmt.start)


SPELT = make_tokenizer()  # has none of the other formats' tokens


@pytest.mark.parametrize("name", [n for n, spec in FORMAT_SPECS.items() if not spec.required])
@given(final=st.none() | st.text("ab :\n<>|", max_size=8))
def test_a_delimiter_that_is_spelt_out_is_an_end_marker(name: str, final: str | None) -> None:
    fmt = _format(SPELT, (0,), name)
    spec = fmt.spec
    assert fmt.end_markers == (spec.end,) and fmt.triggers == (0,) and not fmt.single_tokens
    forced = fmt.forced_end(final)
    final = spec.final_text if final is None else final
    assert SPELT.decode(forced, False) == spec.end + spec.separator + final
    n = fmt.delimiter_len(forced)
    text = SPELT.decode(forced[:n], False)
    assert text.startswith(spec.end) and not text[len(spec.end) :].strip()


def test_a_token_may_join_a_delimiter_and_blanks_only() -> None:
    """With a token "]b" the final text must not begin inside the delimiter."""
    tokenizer = make_tokenizer(visible=("]b", "]\n"))
    fmt = _format(tokenizer, (), "mistral")
    forced = fmt.forced_end("body")
    assert tokenizer.decode(forced[: fmt.delimiter_len(forced)], False) == "[/THINK]"
    assert tokenizer.decode(forced[fmt.delimiter_len(forced) :], False) == "body"
    forced = fmt.forced_end("\nbody")
    assert tokenizer.decode(forced[: fmt.delimiter_len(forced)], False) == "[/THINK]\n"


@pytest.mark.parametrize(("requested", "lacks"), [("s1", "<|im_start|>"), ("gpt-oss", "<|start|>")])
def test_missing_delimiters_are_named(requested: str, lacks: str) -> None:
    bare = make_tokenizer(special=("<s>",))
    with pytest.raises(RequestError, match="single token") as raised:
        _format(bare, (), requested)
    assert lacks in str(raised.value)
    assert raised.value.param == "reasoning_format"


# --- formats of a user ---


def test_the_flags_know_every_format() -> None:
    assert set(REASONING_FORMATS) == {"auto", "none", *FORMAT_SPECS}
    for name in FORMAT_SPECS:
        assert find_spec(name, None, None) is FORMAT_SPECS[name]


def test_delimiters_of_the_flags() -> None:
    spec = find_spec("auto", "<reason>\n", "\n</reason>\n\n")
    assert (spec.start, spec.open_marker, spec.end) == ("<reason>\n", "<reason>", "</reason>")
    assert (spec.newline, spec.closing_text("So")) == ("\n", "</reason>\n\nSo")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_start": "<r>"}, "reasoning_end"),
        ({"reasoning_end": "<r>"}, "reasoning_start"),
        ({"reasoning_start": "<r>", "reasoning_end": "</r>", "reasoning_format": "s1"}, "start"),
        ({"reasoning_format": "S1"}, "reasoning_format"),
    ],
)
def test_flags_that_do_not_fit(fields: dict[str, str], param: str) -> None:
    with pytest.raises(RequestError, match=param):
        EngineConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("start", "end", "param"),
    [
        (" ", "x", "reasoning_start"),
        ("x", "\n", "reasoning_end"),
        ("x", "x", "reasoning_end"),
        ("x" * 2000, "y", "reasoning_start"),
        ("\ud800", "y", "reasoning_start"),
    ],
)
def test_delimiters_that_do_not_fit(start: str, end: str, param: str) -> None:
    with pytest.raises(RequestError) as raised:
        find_spec("auto", start, end)
    assert raised.value.param == param


def test_a_file_of_a_format(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    values = {"start": "<r>", "end": "</r>", "ends": ["</r>", "<a>"], "opens_itself": False}
    file.write_text(json.dumps(values))
    spec = find_spec(str(file), None, None)
    assert (spec.name, spec.ends, spec.opens_itself) == ("mine", ("</r>", "<a>"), False)
    fmt = encode_format(spec, SPELT, ())
    assert fmt.end_markers == ("</r>", "<a>")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "reasoning_format"),
        ("[]", "object"),
        ('{"start": "<r>"}', "end is missing"),
        ('{"start": "<r>", "end": ""}', "end is empty"),
        ('{"start": "<r>\\n", "end": "<r>"}', "end equals"),
        ('{"start": "<r>", "end": "</r>\\n"}', "end has blanks"),
        ('{"start": "<r>", "end": 3}', "end must be a text"),
        ('{"start": "<r>", "end": "<e>", "ends": "<e>"}', "ends must be a list"),
        ('{"start": "<r>", "end": "<e>", "ends": [""]}', "ends must be a list"),
        ('{"start": "<r>", "end": "<e>", "newline_always": 1}', "newline_always must be true"),
        ('{"start": "<r>", "end": "<e>", "stop": "x"}', "unknown field 'stop'"),
        ('{"start": "<r>", "end": "<e>", "channels": {}}', "unknown field 'channels'"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(RequestError, match=says) as raised:
        find_spec(str(file), None, None)
    assert str(file) in str(raised.value) and raised.value.param == "reasoning_format"


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="No such file"):
        find_spec(str(tmp_path / "no.json"), None, None)


# --- open thinking ---


def test_open_thinking_of_s1() -> None:
    fmt = _format(TINY_S1, (TINY_S1.single_token_id(CHATML[2]) or 0,), "s1")
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
    fmt = _format(TINY_TAGS, (TINY_TAGS.single_token_id(CHATML[2]) or 0,), "think-tag")
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


@pytest.mark.parametrize(("tokenizer", "name"), [(TINY_S1, "s1"), (TINY_TAGS, "think-tag")])
@given(data=st.data())
def test_open_thinking_by_definition(tokenizer: Tokenizer, name: str, data: st.DataObject) -> None:
    fmt = _format(tokenizer, (0,), name)
    pieces = [fmt.start, fmt.open_marker, fmt.natural_end, fmt.newline, fmt.triggers]
    pieces.append((7,))
    drawn = data.draw(st.lists(st.sampled_from(pieces), max_size=8))
    prompt = [token for piece in drawn for token in piece]
    assert find_open_thinking(prompt, fmt) == _by_scanning_forward(prompt, fmt)
