"""From a chat to prompt text: validation of messages, and the model's Jinja template in a sandbox.

Messages come from requests and are validated field by field. Templates come from the model
directory or from a flag; they run in Jinja's immutable sandbox, over plain data, with bounded
output. Knows no token ids.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2.meta import find_undeclared_variables

from s1engine.errors import RequestError
from s1engine.template_environment import (
    MAX_REASON_CHARS,
    RefusedError,
    compile_template,
    create_environment,
    failing_line,
)
from s1engine.template_work import KEY, Work
from s1engine.tool_prompt import without_tools

REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
"""Names of an earlier turn's thinking, in requests and templates."""
MEANT_KEYS = (*REASONING_NAMES, "tool_calls", "function_call", "tools", "audio")
"""Keys of a message that are never ignored; others that are not supported are inert."""
_INSTEAD_OF_CONTENT = (*REASONING_NAMES, "tool_calls")
INVALID = "invalid_json"  # the argument that stands for arguments which are no JSON object
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 4096
TURN_OPTIONS = ("add_generation_prompt", "continue_final_message")
PROBE = "is a system message shown"
_END_MARK = "S1ENGINE_END_OF_FINAL_MESSAGE "  # its space shows whether the template keeps spaces

Message = dict[str, Any]

# --- messages ---


def check_messages(messages: object) -> list[Message]:
    """Messages as templates expect them: content is one string, role ``developer`` becomes
    ``system``, thinking is in ``reasoning_content`` and under the names that other templates read,
    arguments of calls are objects. Raises RequestError naming the field."""
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
    instead = role == "assistant" and any(map(message.get, _INSTEAD_OF_CONTENT))
    if content is None and (instead or role == "tool"):
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
        elif key in REASONING_NAMES and role == "assistant":
            _add_reasoning(checked, _string(value, f"{where}.{key}"), f"{where}.{key}")
        elif key in MEANT_KEYS:
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
    """Arguments of a call: an object, or its JSON text as in OpenAI's API; nothing is an empty
    one. Text that is no object is what a model wrote wrongly: it is shown as INVALID, since an
    agent that sends its history back cannot change it."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            value = None
        return value if isinstance(value, dict) else {INVALID: arguments}
    if not isinstance(arguments, dict):
        raise RequestError(f"{where} must be an object", param=where)
    return arguments


def _add_reasoning(message: Message, text: str, where: str) -> None:
    for name in REASONING_NAMES:
        if message.setdefault(name, text) != text:
            raise RequestError(f"{where} differs from another name of it", param=where)


# --- templates ---


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja text.
        special_tokens: variables of the template, such as ``bos_token``.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        try:
            self._template = compile_template(source, special_tokens)
            self.variables: frozenset[str] = frozenset(
                find_undeclared_variables(create_environment().parse(source))
            )
            """Names that the template expects."""
        except Exception as error:  # Python compiles what Jinja writes, and has limits of its own
            raise _failure(error) from error

    @property
    def knows_tools(self) -> bool:
        """True if the template uses the variable ``tools``."""
        return "tools" in self.variables

    @cached_property
    def shows_system(self) -> bool:
        """True if the template shows a system message."""
        chat = [{"role": "system", "content": PROBE}, {"role": "user", "content": "?"}]
        variables = {"messages": chat, "tools": None, "documents": None}
        try:
            return PROBE in self._render({**variables, "add_generation_prompt": True})
        except RequestError:
            return False

    def render(
        self,
        messages: object,
        options: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The chat, by default up to the header of the assistant's next turn; with
        ``continue_final_message`` up to the end of the last message's text. A template that does
        not know tools gets their description as text, calls and results too. Raises RequestError
        naming ``messages``, ``continue_final_message`` or ``chat_template``."""
        checked = check_messages(messages)
        if not self.knows_tools and (tools or any(map(_is_about_tools, checked))):
            checked = without_tools(checked, tools, bool(tools) and self.shows_system)
        variables = {
            **options,
            "messages": checked,
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        return self._render_open(variables) if continue_final_message else self._render(variables)

    def _render_open(self, variables: dict[str, Any]) -> str:
        """The chat without what closes its last message. The method is that of transformers: the
        text ends where a mark at the end of the message appears."""
        *others, last = variables["messages"]
        if last["role"] != "assistant" or "tool_calls" in last:
            raise _not_continued("it must be text of the assistant", len(others))
        marked = {**last, "content": last["content"] + _END_MARK}
        text = self._render({**variables, "messages": [*others, marked]})
        end = text.rfind(_END_MARK.strip())
        if end < 0 or last["content"].strip() not in text:
            raise _not_continued("the chat template changes its text", len(others))
        kept = text.startswith(_END_MARK, end)
        return text[:end] if kept else text[:end].rstrip()

    def _render(self, variables: Mapping[str, Any]) -> str:
        num_chars = sum(len(message["content"]) for message in variables["messages"])
        try:
            return self._template.render({**variables, KEY: Work(num_chars)})
        except RefusedError as error:
            raise RequestError(f"the chat template refuses: {error}", param="messages") from error
        except Exception as error:  # an expression in a template can raise anything
            raise _failure(error) from error


def resolve_turn(messages: object, options: Mapping[str, Any]) -> tuple[bool, bool]:
    """``add_generation_prompt`` and ``continue_final_message`` of a request, from ``options`` with
    these names: by default a chat that ends in an assistant's message is continued, and another
    one gets the header. Raises RequestError for options that contradict one another."""
    header, continues = (_flag(options, name) for name in TURN_OPTIONS)
    if header and continues:
        raise RequestError(
            "add_generation_prompt and continue_final_message exclude one another",
            param="continue_final_message",
        )
    last = messages[-1] if isinstance(messages, list) and messages else None
    if continues is None:
        is_answer = isinstance(last, dict) and last.get("role") == "assistant"
        continues = is_answer and not header
    return header if header is not None else not continues, continues


def _flag(options: Mapping[str, Any], name: str) -> bool | None:
    flag = options.get(name)
    if flag is not None and not isinstance(flag, bool):
        raise RequestError(f"{name} must be true or false", param=name)
    return flag


def _not_continued(why: str, index: int) -> RequestError:
    return RequestError(
        f"messages[{index}] cannot be continued: {why}", param="continue_final_message"
    )


def _failure(error: Exception) -> RequestError:
    line = failing_line(error)
    where = "" if line is None else f" line {line}"
    text = " ".join(str(error)[:MAX_REASON_CHARS].split()) or type(error).__name__
    return RequestError(f"chat_template{where}: {text}", param="chat_template")


def _is_about_tools(message: Message) -> bool:
    return message["role"] == "tool" or "tool_calls" in message
