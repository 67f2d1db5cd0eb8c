"""Target ``templates``: a chat template of a model directory, compiled and rendered.

A template that is wrong or asks for too much is refused as a RequestError or a ModelError; a text
that it renders is bounded, and equal when it is rendered again.
"""

from s1engine.chat_template import ChatTemplate
from s1engine.errors import ModelError, RequestError
from s1engine.template_work import Work
from tests.fuzz.target import Target
from tests.tiny_tokenizer import TEMPLATE

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHATS = (
    [{"role": "user", "content": "a"}],
    [
        {"role": "system", "content": "é"},
        {"role": "user", "content": "<b>"},
        {"role": "assistant", "content": "", "reasoning_content": "thought"},
    ],
)


def run(data: bytes) -> None:
    source = data.decode(errors="ignore")
    try:
        template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    except (RequestError, ModelError):
        return
    for chat in CHATS:
        for continues in (False, chat[-1]["role"] == "assistant"):
            try:
                tools = [TOOL] if template.knows_tools else []
                options = {"enable_thinking": True}
                text = template.render(chat, options, tools, continue_final_message=continues)
            except (RequestError, ModelError) as error:
                assert str(error)
                continue
            assert len(text) <= Work(sum(len(message["content"]) for message in chat)).left


WORDS = [
    *(b"{{", b"}}", b"{%", b"%}", b"{%-", b"-%}", b"{#", b"#}", b"{% for m in messages %}"),
    *(b"{% endfor %}", b"{% if ", b"{% endif %}", b"{% set x = ", b"namespace(", b"loop.index0"),
    *(b"raise_exception(", b"strftime_now(", b"|tojson", b"|from_json", b"range(", b"messages"),
    *(b"add_generation_prompt", b"m.content", b"m['role']", b"{% macro f(a) %}", b"{% endmacro %}"),
    *(b"{% generation %}", b"{% endgeneration %}", b"|join(", b"|map(attribute=", b"|selectattr("),
    *(b"{% break %}", b"{% continue %}", b"{% call f() %}", b"{% filter upper %}", b"|batch(2)"),
    *(
        b".split(",
        b".format(",
        b".items()",
        b"**",
        b"*",
        b"~",
        b"[::-1]",
        b"is defined",
        TEMPLATE.encode(),
    ),
]
TARGETS = {"templates": Target(run, WORDS)}
