"""Every reasoning format on a scripted model, which opens, ends, repeats and splits its markers in
every way: thinking and answer are apart, whole or streamed, and no part of a marker is shown."""

import itertools
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from s1engine.engine.answer_text import MarkerFilter
from s1engine.reasoning_specs import FORMAT_SPECS
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from tests.engine.scripted_model import CHAT, ScriptedModel

OWN_TOKENS = {
    "think-tag": ("<think>", "</think>"),
    "mistral": ("[THINK]", "[/THINK]"),
    "seed-oss": ("<seed:think>", "</seed:think>"),
    "openthinker": (
        "<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>",
        "<|end_of_solution|>",
    ),
    "gemma4": ("<|channel>", "<channel|>"),
    "gpt-oss": ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
    "s1": (),
}  # fmt: skip
CUSTOM = {"reasoning_start": "<r>\n", "reasoning_end": "\n</r>\n"}
VARIANTS = [(name, True) for name in OWN_TOKENS]
VARIANTS += [(name, False) for name in OWN_TOKENS if name not in ("s1", "gpt-oss")]
VARIANTS += [("custom", False)]
EXAMPLES = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NAMES = [f"{name}, {'own tokens' if own else 'spelt out'}" for name, own in VARIANTS]


@pytest.fixture(scope="module", params=VARIANTS, ids=NAMES)
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> ScriptedModel:
    name, own = request.param
    options = CUSTOM if name == "custom" else {"reasoning_format": name}
    tokens = OWN_TOKENS[name] if own else ()
    return ScriptedModel(tmp_path_factory.mktemp("model"), tokens, **options)


class Writer:
    """The script of a text in which markers are written as this model writes them."""

    def __init__(self, model: ScriptedModel) -> None:
        fmt = model.llm.engine.format
        assert fmt is not None
        self.fmt, self.spec, self._encode = fmt, fmt.spec, model.tokenizer.encode
        self.end = fmt.spec.ends[0] if fmt.spec.ends else fmt.spec.end
        self.hidden = [*fmt.spec.closers, *fmt.spec.hidden]
        self.hidden = [text for text in self.hidden if text != "<|im_end|>"]  # it ends the turn
        if fmt.spec.channels is not None:
            self.hidden = []  # see the tests of channels
        self.spelt = bool(fmt.end_markers)

    def ids(self, text: str, cuts: list[int] = []) -> list[int]:  # noqa: B006 (not changed)
        """Ids of ``text``; markers that are spelt out are cut at ``cuts`` as well."""
        places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
        if not self.spelt:
            places = [0, len(text)]
        pieces = [text[a:b] for a, b in itertools.pairwise(places)]
        return [token for piece in pieces for token in self._encode(piece)]

    def shown(self, text: str) -> str:
        """The answer that a text becomes: without markers, by their definition."""
        pattern = "|".join(map(re.escape, sorted(self.hidden, key=len, reverse=True)))
        return re.sub(pattern, "", text).lstrip("\n") if pattern else text.lstrip("\n")


def texts(writer: Writer, markers: bool) -> st.SearchStrategy[str]:
    """Texts with halves of markers and, if ``markers``, whole ones. A marker of a token of its own
    has no halves that its text could show: spelt out it is plain text."""
    pieces = ["a", "b c", "\n", ".", "é", "<", ">", "/", "[", "so it is "]
    if writer.spelt:
        pieces += [writer.end[:n] for n in range(1, len(writer.end))]
        pieces += [writer.end[n:] for n in range(1, len(writer.end))]
    if markers:
        pieces += [text for text in writer.hidden for _ in range(3)]
    return st.lists(st.sampled_from(pieces), max_size=8).map("".join)


@EXAMPLES
@given(data=st.data())
def test_thinking_and_answer_are_apart(model: ScriptedModel, data: st.DataObject) -> None:
    writer = Writer(model)
    thinking = data.draw(texts(writer, markers=False))
    answer = data.draw(texts(writer, markers=True))
    assume((thinking + writer.end).find(writer.end) == len(thinking))
    assume(not any(text in thinking for text in writer.hidden))
    cuts = data.draw(st.lists(st.integers(0, 400), max_size=6))
    if writer.spelt:
        script = writer.ids(thinking + writer.end + answer, cuts)
    else:
        script = writer.ids(thinking) + writer.ids(writer.end) + writer.ids(answer)
    output = model.answer(script)
    assert output.reasoning == thinking.lstrip("\n")
    assert output.text == writer.shown(answer)
    assert output.thinking is not None and output.thinking.end_reason == "natural"
    assert output.finish_reason == "stop"


@EXAMPLES
@given(data=st.data())
def test_a_model_that_ignores_its_budget_shows_no_marker(
    model: ScriptedModel, data: st.DataObject
) -> None:
    """The model thinks on after a forced end, ends its thinking once more, and answers."""
    writer = Writer(model)
    if writer.spec.channels is not None:
        pytest.skip("see the tests of channels")
    thinking = data.draw(st.sampled_from(["abc and so it is", "x y z."]))
    answer = data.draw(texts(writer, markers=True))
    ids = writer.ids(thinking)
    budget = data.draw(st.integers(0, len(ids) - 1))
    script = ids + writer.ids(writer.end + answer)
    output = model.answer(script, SamplingParams(thinking=ThinkingBudget(max_tokens=budget)))
    decode = model.tokenizer.decode
    assert output.reasoning == decode(ids[:budget])
    final = writer.spec.final_text
    begin = final + decode(ids[budget:])
    assert output.text == writer.shown(begin + writer.end + answer)
    assert output.thinking is not None and output.thinking.tokens == budget
    assert output.token_ids[-len(script) + budget - 1 : -1] == script[budget:]


@EXAMPLES
@given(
    first=st.sampled_from(["so", "a b.", "x\n"]),
    second=st.sampled_from(["", " but no", "\nyes"]),
    num_waits=st.integers(0, 2),
)
def test_a_wait_replaces_the_marker(
    model: ScriptedModel, first: str, second: str, num_waits: int
) -> None:
    writer = Writer(model)
    end = writer.ids(writer.end)
    script = writer.ids(first) + end + writer.ids(second) + end + writer.ids("yes")
    output = model.answer(script, SamplingParams(thinking=ThinkingBudget(num_waits=num_waits)))
    assert output.thinking is not None and output.thinking.waits_used == num_waits
    if num_waits == 0:
        assert output.reasoning == first
        repeated = "\n\n" if writer.spec.channels and second else writer.end
        assert output.text == writer.shown(second + repeated + "yes").removeprefix(
            writer.end if writer.spec.channels else ""
        )
    elif num_waits == 1:
        assert output.reasoning == f"{first}Wait{second}" and output.text == "yes"
    else:
        assert output.reasoning == f"{first}Wait{second}Waityes" and output.text == ""


def test_a_prompt_that_opens_its_thinking(model: ScriptedModel) -> None:
    writer = Writer(model)
    prompt = "q " + writer.spec.start + "so it"
    script = writer.ids(" is") + writer.ids(writer.end) + writer.ids("yes")
    output = model.answer(script, prompt=prompt)
    assert (output.reasoning, output.text) == (" is", "yes")


def test_a_grammar_alone_decides_what_an_answer_holds(model: ScriptedModel) -> None:
    request = model.llm.engine.make_request(CHAT, SamplingParams(grammar='start: "a"'))
    assert request.markers is None


def test_thinking_that_is_switched_off_is_not_content(model: ScriptedModel) -> None:
    writer = Writer(model)
    if writer.spec.channels is not None:
        pytest.skip("see the tests of channels")
    output = model.answer(writer.ids(writer.end + "yes" + writer.end), enable_thinking=False)
    assert output.text == "yes" and output.reasoning is None


# --- channels ---


@pytest.fixture(scope="module")
def harmony(tmp_path_factory: pytest.TempPathFactory) -> ScriptedModel:
    folder = tmp_path_factory.mktemp("model")
    return ScriptedModel(folder, OWN_TOKENS["gpt-oss"], reasoning_format="gpt-oss")


TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
TURN = "<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
CALL = "<|channel|>commentary to=functions.add <|constrain|>json<|message|>"
OTHER_CALL = " to=functions.add<|channel|>commentary json<|message|>"
CALLED = '<tool_call>\n{"name": "add", "arguments": {"n": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("tools", "text", "reasoning", "shown"),
    [
        (False, "so<|end|>yes", "so", "yes"),
        (False, f"so<|end|>yes{TURN}{FINAL}no", "so", "yes\n\nno"),
        (False, f"so<|end|>yes{TURN}<|channel|>analysis<|message|>hm{TURN}{FINAL}no", "sohm",
         "yes\n\nno"),
        (False, f"so<|end|>yes{TURN}<|channel|>fin", "so", "yes"),
        (False, "so<|end|>{" + '"a": "assistant"}', "so", '{"a": "assistant"}'),
        (True, f"so<|end|>{FINAL}yes", "so", "yes"),
        (True, f"so<|end|>{CALL}" + '{"n": 1}<|call|>', "so", CALLED),
        (True, f"so<|end|>{OTHER_CALL}" + '{"n": 1}<|call|>', "so", CALLED),
        (True, f"so<|end|>{CALL}" + '{"n": 1}', "so", CALLED),
        (True, f"so<|end|><|channel|>commentary<|message|>Let me.{TURN}{CALL}" + '{"n": 1}<|call|>',
         "so", f"Let me.\n{CALLED}"),
        (True, f"so<|end|><|channel|>analysis<|message|>hm{TURN}{FINAL}yes", "sohm", "yes"),
    ],
)  # fmt: skip
def test_channels(
    harmony: ScriptedModel, tools: bool, text: str, reasoning: str, shown: str
) -> None:
    script = harmony.tokenizer.encode(text)
    options = {"tools": TOOLS} if tools else {}
    output = harmony.answer(script, **options)
    assert (output.reasoning, output.text) == (reasoning, shown)
    natural = harmony.tokenizer.decode(output.token_ids, skip_special_tokens=False)
    assert natural.startswith("so" + TURN + ("" if tools else FINAL))


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("budget", [0, 2])
def test_channels_with_a_budget(harmony: ScriptedModel, tools: bool, budget: int) -> None:
    thinking = harmony.tokenizer.encode("the quick brown fox")
    rest = harmony.tokenizer.encode((FINAL if tools else "") + "yes")
    params = SamplingParams(thinking=ThinkingBudget(max_tokens=budget))
    options = {"tools": TOOLS} if tools else {}
    output = harmony.answer(thinking[:budget] + rest, params, **options)
    assert output.text == "yes"
    assert output.reasoning == harmony.tokenizer.decode(thinking[:budget])


def test_a_call_that_is_cut_off_stays_open(harmony: ScriptedModel) -> None:
    script = harmony.tokenizer.encode(f"so<|end|>{CALL}" + '{"n": 1')
    whole = harmony.answer(script, tools=TOOLS)
    params = SamplingParams(max_tokens=len(whole.token_ids) - 1)
    output = harmony.answer(script, params, tools=TOOLS)
    assert output.finish_reason == "length"
    assert output.text == CALLED.partition("}")[0]


# --- the filter ---


@given(
    markers=st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=4),
    pieces=st.lists(st.text("ab<c", max_size=5), max_size=8),
)
def test_markers_are_removed_however_the_text_is_cut(markers: list[str], pieces: list[str]) -> None:
    pattern = "|".join(map(re.escape, sorted(set(markers), key=len, reverse=True)))
    whole = re.sub(pattern, "", "".join(pieces))
    growing: MarkerFilter[str] = MarkerFilter(markers)
    assert "".join(map(growing.push, pieces)) + growing.push("", last=True) == whole
    ids: MarkerFilter[tuple[int, ...]] = MarkerFilter([tuple(map(ord, m)) for m in markers])
    kept = [token for piece in pieces for token in ids.push(tuple(map(ord, piece)))]
    kept += ids.push((), last=True)
    assert "".join(map(chr, kept)) == whole


def test_every_format_is_tested() -> None:
    assert set(OWN_TOKENS) == set(FORMAT_SPECS)
