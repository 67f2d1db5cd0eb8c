"""From a chat to prompt text: validation of messages, and the model's Jinja template in a sandbox.

Messages come from requests and are validated field by field. Templates come from the model
directory or from a flag; they run in Jinja's immutable sandbox, over plain data, with bounded
output. Knows no token ids.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from s1engine.errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 4096
MAX_RENDERED_CHARS = 2**25

Message = dict[str, Any]

# --- messages ---


def check_messages(messages: object) -> list[Message]:
    """Messages as templates expect them: content is one string, role ``developer`` becomes
    ``system``, thinking is in ``reasoning_content``, arguments of calls are objects. Raises
    RequestError naming the field."""
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise RequestError(f"messages must be a list of 1 to {MAX_MESSAGES}", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object", param=where)
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}", param=f"{where}.role")
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    checked: Message = {
        "role": "system" if role == "developer" else role,
        "content": _content(content, f"{where}.content"),
    }
    for key, value in message.items():
        if key in ("role", "content") or value is None or value == []:
            continue
        if key == "name" or (key == "tool_call_id" and role == "tool"):
            checked[key] = _string(value, f"{where}.{key}")
        elif key == "tool_calls" and role == "assistant":
            checked[key] = _tool_calls(value, f"{where}.{key}")
        elif key in ("reasoning", "reasoning_content") and role == "assistant":
            _add_reasoning(checked, _string(value, f"{where}.{key}"), f"{where}.{key}")
        else:
            raise RequestError(f"{where}.{key} is not supported", param=f"{where}.{key}")
    return checked


def _content(content: object, where: str) -> str:
    if isinstance(content, list):
        return "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))
    return _string(content, where)


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise RequestError(f"{where}: only parts of type text are supported", param=where)
    return _string(part.get("text"), f"{where}.text")


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where} must be text", param=where)
    return value


def _tool_calls(calls: object, where: str) -> list[Message]:
    if not isinstance(calls, list):
        raise RequestError(f"{where} must be a list", param=where)
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: object, where: str) -> Message:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise RequestError(f"{where} must be an object with a function", param=where)
    checked: Message = {"type": "function"}
    if call.get("id") is not None:
        checked["id"] = _string(call["id"], f"{where}.id")
    where = f"{where}.function"
    name = _string(function.get("name"), f"{where}.name")
    arguments = _arguments(function.get("arguments"), f"{where}.arguments")
    return {**checked, "function": {"name": name, "arguments": arguments}}


def _arguments(arguments: object, where: str) -> dict[str, Any]:
    """Arguments of a call: an object, or its JSON text as in OpenAI's API."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where} is not JSON: {error}", param=where) from error
    if not isinstance(arguments, dict):
        raise RequestError(f"{where} must be an object", param=where)
    return arguments


def _add_reasoning(message: Message, text: str, where: str) -> None:
    if message.setdefault("reasoning_content", text) != text:
        raise RequestError("reasoning and reasoning_content differ", param=where)


# --- templates ---


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja text.
        special_tokens: variables of the template, such as ``bos_token``.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        environment = _environment()
        try:
            self._template = environment.from_string(source, globals=dict(special_tokens))
            self.knows_tools: bool = "tools" in find_undeclared_variables(environment.parse(source))
            """True if the template uses the variable ``tools``."""
        except TemplateError as error:
            raise RequestError(f"chat_template: {error}", param="chat_template") from error

    def render(
        self,
        messages: object,
        options: Mapping[str, Any],
        tools: Sequence[Message] = (),
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The chat, by default up to the header of the assistant's next turn. Raises RequestError
        naming ``messages``, ``tools`` or ``chat_template``."""
        checked = check_messages(messages)
        if not self.knows_tools:
            _refuse_tools(checked, tools)
        variables = {
            **options,
            "messages": checked,
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(variables):
                size += len(piece)
                if size > MAX_RENDERED_CHARS:
                    raise SecurityError(f"it renders more than {MAX_RENDERED_CHARS} characters")
                pieces.append(piece)
        except _RefusedError as error:
            raise RequestError(f"the chat template refuses: {error}", param="messages") from error
        except Exception as error:  # an expression in a template can raise anything
            raise RequestError(f"chat_template fails: {error}", param="chat_template") from error
        return "".join(pieces)


def _refuse_tools(messages: Sequence[Message], tools: Sequence[Message]) -> None:
    """Rejects tools that a template without ``tools`` would silently ignore."""
    if tools:
        raise RequestError("this model's chat template does not know tools", param="tools")
    for message in messages:
        if message["role"] == "tool" or "tool_calls" in message:
            raise RequestError("this model's chat template does not know tools", param="messages")


class _RefusedError(TemplateError):
    """The template called ``raise_exception``."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox that also rejects a sequence repeated beyond the bound of the output."""

    intercepted_binops = frozenset({"*"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for sequence, count in ((left, right), (right, left)):
            repeats = isinstance(sequence, str | list | tuple) and isinstance(count, int)
            if repeats and len(sequence) * count > MAX_RENDERED_CHARS:
                raise SecurityError(f"it repeats a value {count} times")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """Ignores ``{% generation %}``, which marks the assistant's part for trainers."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's declaration)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """An environment with the block trimming, names and JSON that templates of the hub expect."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_refuse, strftime_now=_strftime_now, namespace=_namespace, dict=_dict
    )
    return environment


def _refuse(message: object) -> None:
    raise _RefusedError(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _namespace(**values: Any) -> Namespace:
    if any(name.startswith("_") for name in values):
        raise SecurityError("names in a namespace must not begin with an underscore")
    return Namespace(**values)


def _dict(*args: Any, **values: Any) -> dict[Any, Any]:
    return dict(*args, **values)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **how: Any) -> str:
    """Plain JSON; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **how)
