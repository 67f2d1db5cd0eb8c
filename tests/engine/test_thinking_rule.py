"""Which chats think: templates in the manner of each family, requests, and raw prompts.

The templates are our own; each opens, closes or leaves out its thinking as its family does.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from s1engine.config import BUNDLED_MODEL, EngineConfig
from s1engine.engine.model_text import ModelText
from s1engine.engine.request import Request
from s1engine.engine.request_compiler import RequestCompiler
from s1engine.engine.thinking_detection import detect_thinking
from s1engine.engine.thinking_rule import ThinkingRule
from s1engine.errors import ModelError, RequestError
from s1engine.models.model_config import ModelConfig
from s1engine.reasoning_specs import FORMAT_SPECS
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from s1engine.tokenizer import Tokenizer
from tests.tiny_tokenizer import CHATML, TEMPLATE, make_backend, make_tokenizer

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}"
    "<t>{{ m.reasoning_content }}</t>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
)
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n"
TAGS = ("<think>", "</think>")
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
GEMMA = ("<|channel>", "<channel|>", "<|turn>", "<turn|>")

# name: template, tokens, format, chats think by default, what the prompt then ends in
MANNERS: dict[str, tuple[str, tuple[str, ...], str | None, bool, str]] = {
    "opens always, as QwQ": (
        TURNS + HEADER + "<think>\n{% endif %}", TAGS, "think-tag", True, "assistant\n<think>\n"
    ),
    "opens without a newline, as Olmo 3": (
        TURNS + HEADER + "<think>{% endif %}", TAGS, "think-tag", True, "assistant\n<think>"
    ),
    "opens a spelt-out block": (
        TURNS + HEADER + "<think>\n{% endif %}", (), "think-tag", True, "assistant\n<think>\n"
    ),
    "ignores add_generation_prompt": (
        TURNS + "<|im_start|>assistant\n<think>\n", TAGS, "think-tag", True, "t\n<think>"
    ),
    "closes if asked, as Qwen3": (
        TURNS + HEADER + "{% if enable_thinking is defined and not enable_thinking %}"
        "<think>\n\n</think>\n\n{% endif %}{% endif %}",
        TAGS, "think-tag", True, "assistant\n<think>\n",
    ),
    "closes by default": (
        TURNS + HEADER + "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n"
        "{% endif %}{% endif %}",
        TAGS, "think-tag", False, "</think>\n\n",
    ),
    "is switched by another name": (
        TURNS + HEADER + "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}",
        TAGS, "think-tag", False, "</think>",
    ),
    "mentions it in the system prompt, as Phi-4-reasoning": (
        "<|im_start|>system\nThink in <think> and </think>.<|im_end|>\n" + TURNS + HEADER
        + "{% endif %}",
        TAGS, "think-tag", True, "assistant\n<think>\n",
    ),
    "drops earlier thinking, as early R1": (
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}" + HEADER
        + "{% endif %}",
        TAGS, "think-tag", True, "assistant\n<think>\n",
    ),
    "Magistral": (
        "Draft your thoughts: [THINK]Here[/THINK]" + TURNS + HEADER + "{% endif %}",
        ("[THINK]", "[/THINK]"), "mistral", True, "assistant\n[THINK]",
    ),
    "Seed-OSS": (
        "{% set begin = '<seed:think>' %}" + TURNS + HEADER + "{% endif %}",
        ("<seed:think>", "</seed:think>"), "seed-oss", True, "assistant\n<seed:think>",
    ),
    "OpenThinker": (
        "Use <|begin_of_thought|> and <|end_of_thought|>." + TURNS + HEADER + "{% endif %}",
        (), "openthinker", True, "assistant\n<|begin_of_thought|>\n\n",
    ),
    "Gemma 4": (
        "{% if enable_thinking %}<|think|>{% endif %}{% for m in messages %}<|turn>{{ m.role }}\n"
        "{{ m.content }}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n"
        "{% if not enable_thinking | default(false) %}<|channel>thought\n<channel|>{% endif %}"
        "{% endif %}",
        GEMMA, "gemma4", False, "model\n<|channel>thought\n<channel|>",
    ),
    "thinks only if asked, without a block": (
        "{% if enable_thinking %}Use <think>.{% endif %}" + TURNS + HEADER + "{% endif %}",
        TAGS, "think-tag", False, "assistant\n",
    ),
    "closes by a word in the system prompt, as Nemotron": (
        "{% set thinks = messages[0].content != '/no_think' %}" + TURNS + HEADER
        + "{% if not thinks %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        TAGS, "think-tag", True, "assistant\n<think>\n",
    ),
    "gpt-oss": (
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>"
        "{% if m.reasoning_content %}<|channel|>analysis<|message|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        HARMONY, "gpt-oss", True, "<|start|>assistant<|channel|>analysis<|message|>",
    ),
    "s1 in its template": (
        "{# <|im_start|>think #}" + TURNS + HEADER + "{% endif %}",
        (), "s1", True, "assistant\n<|im_start|>think",
    ),
    "ChatML, as Qwen2.5 and SmolLM2": (TEMPLATE, (), "s1", False, "assistant\n"),
    "ChatML with tags, as Qwen3-Instruct-2507": (TEMPLATE, TAGS, "think-tag", False, "assistant\n"),
    "no format": (
        "{% for m in messages %}{{ m.content }}{% endfor %}", (), None, False, "thought?"
    ),
}  # fmt: skip
CHAT: list[Any] = [{"role": "user", "content": "What is thought?"}]
THINKS = [name for name, manner in MANNERS.items() if manner[3]]
CAN_THINK = [name for name, manner in MANNERS.items() if manner[2]]


def tokenizer_of(name: str) -> Tokenizer:
    template, tokens, _, _, _ = MANNERS[name]
    special = CHATML if name != "no format" else ("<s>",)
    return make_tokenizer(special, tokens, template)


def rule_of(name: str, folder: Path = Path("/none"), **options: Any) -> ThinkingRule:
    return detect_thinking(EngineConfig(**options), folder, tokenizer_of(name), (0,))


def compiler_of(name: str, **options: Any) -> RequestCompiler:
    return compiler_over(tokenizer_of(name), **options)


def compiler_over(tokenizer: Tokenizer, **options: Any) -> RequestCompiler:
    config = EngineConfig(**options)
    rule = detect_thinking(config, Path("/none"), tokenizer, (0,))
    model = replace(ModelConfig.from_dir(BUNDLED_MODEL), vocab_size=tokenizer.num_tokens)
    text = ModelText(model, tokenizer, rule, (0,), tokenizer.num_tokens)
    return RequestCompiler(text, 2048, config)


def compile_chat(
    name: str, chat: list[Any] = CHAT, params: SamplingParams | None = None, **options: Any
) -> Request:
    return compiler_of(name).compile(chat, params or SamplingParams(), **options)


def prompt_text(name: str, request: Request) -> str:
    return tokenizer_of(name).decode(request.prompt.tolist(), skip_special_tokens=False)


def rendered(name: str, chat: list[Any] = CHAT, **options: Any) -> str:
    """The oracle: transformers' own rendering."""
    template, tokens, _, _, _ = MANNERS[name]
    fast = PreTrainedTokenizerFast(tokenizer_object=make_backend(visible=tokens))
    return str(
        fast.apply_chat_template(
            chat, chat_template=template, tokenize=False, add_generation_prompt=True, **options
        )
    )


# --- by the template ---


@pytest.mark.parametrize("name", MANNERS)
def test_manner_of_each_family(name: str) -> None:
    _, _, fmt, by_default, ending = MANNERS[name]
    rule = rule_of(name)
    assert (rule.format.name if rule.format else None) == fmt
    request = compile_chat(name)
    assert (request.budget is not None) == by_default
    text = prompt_text(name, request)
    assert text.endswith(ending)
    opened = ending if by_default else ""
    assert text.removesuffix(opened.removeprefix("assistant\n")) in rendered(name)
    if request.budget is not None:
        assert request.budget.tokens_thought == 0


@pytest.mark.parametrize("name", [name for name in MANNERS if name not in THINKS])
def test_a_chat_that_does_not_think_is_that_of_transformers(name: str) -> None:
    request = compile_chat(name)
    assert request.budget is None
    assert request.prompt.tolist() == tokenizer_of(name).encode(rendered(name))


@pytest.mark.parametrize("name", CAN_THINK)
def test_a_thinking_field_makes_a_chat_think(name: str) -> None:
    for options in (
        {"enable_thinking": True},
        {"params": SamplingParams(thinking=ThinkingBudget(max_tokens=7))},
    ):
        request = compile_chat(name, **options)  # type: ignore[arg-type]
        assert request.budget is not None and request.budget.tokens_thought == 0
        fmt = rule_of(name).format
        assert fmt is not None
        text = prompt_text(name, request)
        assert text.rstrip("\n").endswith(fmt.spec.open_marker)
        assert (
            text.count(fmt.spec.start)
            == prompt_text(name, compile_chat(name)).count(fmt.spec.start)
            or name not in THINKS
        )


@pytest.mark.parametrize("name", CAN_THINK)
def test_thinking_that_is_switched_off_is_closed_or_absent(name: str) -> None:
    request = compile_chat(name, enable_thinking=False)
    assert request.budget is None
    rule, text = rule_of(name), prompt_text(name, request)
    assert rule.format is not None
    part = text[len(rendered(name, enable_thinking=False, thinking=False)) :]
    state, _ = rule.format.spec.block_state(text.rpartition("thought?")[2])
    assert state != "open"
    if rule.by_default and rule.format.spec.opens_itself and rule.switch is None:
        assert state == "closed" and part.endswith(rule.format.spec.closing_text(""))
    else:
        assert part == ""


@pytest.mark.parametrize("name", CAN_THINK)
def test_a_marker_in_a_question_opens_and_closes_nothing(name: str) -> None:
    fmt = rule_of(name).format
    assert fmt is not None
    for marker in (fmt.spec.start, fmt.spec.end, fmt.spec.start + fmt.spec.end):
        chat = [{"role": "user", "content": f"What does {marker} mean?"}]
        if name == "drops earlier thinking, as early R1" and fmt.spec.end in marker:
            continue  # it drops the user's text as well
        asked, plain = compile_chat(name, chat), compile_chat(name)
        assert (asked.budget is None) == (plain.budget is None)
        if asked.budget is not None:
            assert asked.budget.tokens_thought == 0
        ending = prompt_text(name, plain).rpartition("thought?")[2]
        assert prompt_text(name, asked).endswith(ending)


def test_closed_thinking_is_not_opened_again() -> None:
    template = TURNS + HEADER + "{% if messages[0].content == '/no_think' %}<think>\n</think>" * 1
    template += "{% endif %}{% endif %}"
    compiler = compiler_over(make_tokenizer(CHATML, TAGS, template))
    chat: list[Any] = [{"role": "system", "content": "/no_think"}, *CHAT]
    assert compiler.compile(CHAT, SamplingParams()).budget is not None
    assert compiler.compile(chat, SamplingParams()).budget is None
    capped = SamplingParams(thinking=ThinkingBudget(max_tokens=5))
    assert compiler.compile(chat, capped).budget is None
    for thinking, param in (
        (ThinkingBudget(min_tokens=5), "thinking_token_budget"),
        (None, "enable_thinking"),
    ):
        options: dict[str, Any] = {} if thinking else {"enable_thinking": True}
        with pytest.raises(RequestError, match="closes the thinking") as raised:
            compiler.compile(chat, SamplingParams(thinking=thinking), **options)
        assert raised.value.param == param


@pytest.mark.parametrize("name", ["closes if asked, as Qwen3", "opens always, as QwQ"])
def test_thinking_of_earlier_turns_reaches_the_template(name: str) -> None:
    chat = [*CHAT, {"role": "assistant", "content": "so", "reasoning_content": " a\n\nb "}, *CHAT]
    request = compile_chat(name, chat)
    assert prompt_text(name, request).startswith(rendered(name, chat))
    assert "<t> a\n\nb </t>so" in prompt_text(name, request)


@pytest.mark.parametrize("name", CAN_THINK)
def test_a_chat_that_is_continued_thinks_if_its_last_message_does(name: str) -> None:
    """A block that the message opens; the template may keep or drop what it closes."""
    if name in ("drops earlier thinking, as early R1", "Gemma 4", "gpt-oss"):
        pytest.skip("the template changes the message")
    compiler = compiler_of(name)
    fmt = compiler.text.format
    assert fmt is not None
    spec = fmt.spec

    def continued(text: str, **options: Any) -> Request:
        params = options.pop("params", SamplingParams())
        chat = [*CHAT, {"role": "assistant", "content": text}]
        return compiler.compile(chat, params, **options)

    opened = continued(spec.start + "so it is")
    assert opened.budget is not None
    assert opened.budget.tokens_thought == len(tokenizer_of(name).encode("so it is"))
    assert prompt_text(name, opened).endswith(spec.start + "so it is")
    plain = continued(spec.start + "so it is", enable_thinking=False)
    assert plain.budget is None and prompt_text(name, plain) == prompt_text(name, opened)
    for text in (f"{spec.start}so{spec.end}yes", "yes"):
        assert continued(text).budget is None
        assert prompt_text(name, continued(text, enable_thinking=False)).endswith(text)
        with pytest.raises(RequestError, match="last message is continued"):
            continued(text, enable_thinking=True)


# --- declared by user or model ---


@pytest.mark.parametrize("requested", FORMAT_SPECS)
def test_a_requested_format_thinks(requested: str) -> None:
    tokens = (*TAGS, *HARMONY)
    tokenizer = make_tokenizer(CHATML, tokens, TEMPLATE)
    config = EngineConfig(reasoning_format=requested)
    rule = detect_thinking(config, Path("/none"), tokenizer, (0,))
    assert rule.format is not None and rule.format.name == requested and rule.by_default


def test_delimiters_of_the_user() -> None:
    rule = rule_of("no format", reasoning_start="<r>", reasoning_end="</r>")
    assert rule.format is not None and rule.by_default
    assert rule.format.end_markers == ("</r>",) and rule.reason == "reasoning_start <r>"


def test_none_switches_off() -> None:
    compiler = compiler_of("closes if asked, as Qwen3", reasoning_format="none")
    assert compiler.compile(CHAT, SamplingParams()).budget is None
    with pytest.raises(RequestError, match="no reasoning format"):
        compiler.compile(CHAT, SamplingParams(), enable_thinking=True)


def test_the_bundled_model_says_its_format() -> None:
    text = ModelText.load(EngineConfig(), BUNDLED_MODEL)
    assert text.format is not None and text.format.name == "s1"
    assert text.thinking.by_default and text.thinking.reason == "reasoning_format s1"


@pytest.mark.parametrize(
    ("name", "is_s1"),
    [
        ("simplescaling/s1-32B", True),
        ("simplescaling/s1.1-7B", True),
        ("/models/models--simplescaling--s1.1-32B/snapshots/abc", True),
        ("/data/s1.1-1.5B-awq", True),
        ("Qwen/Qwen2.5-7B-Instruct", False),
        ("someone/minis1-7B", False),
        ("someone/s1-nothing", False),
        ("someone/s1-7billion", False),
    ],
)
@pytest.mark.parametrize("place", ["model", "_name_or_path", "card", "cards"])
def test_models_of_s1_are_known_by_name(tmp_path: Path, place: str, name: str, is_s1: bool) -> None:
    config = {"_name_or_path": name} if place == "_name_or_path" else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = {"card": f"base_model: {name}", "cards": f"base_model:\n  - a/b\n- {name}"}.get(place)
    if base is not None:
        (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{base}\ntags: [x]\n---\n# s1-7B")
    options = {"model": name} if place == "model" else {}
    rule = rule_of("ChatML, as Qwen2.5 and SmolLM2", tmp_path, **options)
    assert rule.by_default == is_s1
    assert rule.format is not None and rule.format.name == "s1"


def test_a_model_that_says_an_unknown_format(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"reasoning_format": "mine"}')
    with pytest.raises(ModelError, match="reasoning_format must be one of"):
        rule_of("no format", tmp_path)


# --- raw prompts ---


@pytest.mark.parametrize("name", CAN_THINK)
def test_open_thinking_in_a_raw_prompt(name: str) -> None:
    compiler = compiler_of(name)
    fmt = compiler.text.format
    assert fmt is not None
    start = (
        rendered(name) + fmt.spec.start
        if name not in THINKS
        else prompt_text(name, compile_chat(name))
    )
    thought = tokenizer_of(name).encode("so it is")
    request = compiler.compile(start + "so it is", SamplingParams())
    assert request.budget is not None
    assert abs(request.budget.tokens_thought - len(thought)) <= 1  # blanks may join a token
    assert compiler.compile(start + "so" + fmt.spec.end + "yes", SamplingParams()).budget is None
    off = compiler.compile(start + "so", SamplingParams(), enable_thinking=False)
    assert off.budget is None and prompt_text(name, off) == start + "so"  # raw stays raw


@pytest.mark.parametrize("name", CAN_THINK)
def test_a_marker_of_an_earlier_turn_opens_nothing_in_a_raw_prompt(name: str) -> None:
    compiler = compiler_of(name)
    fmt = compiler.text.format
    assert fmt is not None
    if not compiler.text.thinking.header:
        pytest.skip("the template writes no header of its own")
    chat = [{"role": "user", "content": f"What does {fmt.spec.start} mean?"}]
    text = rendered(name, chat).rpartition(fmt.spec.start)
    text = text[0] + text[1] + text[2].partition("<|im_start|>")[0]
    header = tokenizer_of(name).decode(compiler.text.thinking.header, False)
    assert compiler.compile(f"{text}\n{header}\nSo", SamplingParams()).budget is None


@given(text=st.text("ab<>/think\n", max_size=40))
def test_block_state_of_tags(text: str) -> None:
    """Open exactly if the last marker of the text opens."""
    spec = FORMAT_SPECS["think-tag"]
    state, thought = spec.block_state(text)
    opened, closed = text.rfind("<think>"), text.rfind("</think>")
    if opened < 0:
        assert state == ("closed" if closed >= 0 else "absent")
    else:
        assert state == ("open" if opened > closed else "closed")
    if state == "open":
        assert text.endswith(thought) and text[opened + 7 :].removeprefix("\n") == thought
