"""Parsing of rows in the known formats to `Conversation`.

`messages`  chat turns in OpenAI's form, reasoning in its own field or in think tags.
`qa`        a question field and an answer field.
`nemotron`  released Nemotron-Cascade SFT rows: `messages` whose calls, results and reasoning may be
            written inside the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, cast

from nemocascade.data.chat_template import Conversation
from nemocascade.data.errors import RowError
from nemocascade.recipe.data import DataConfig
from nemocascade.types import ROLES, Message, Role, Tool, ToolCall

Format = Literal["messages", "qa", "nemotron"]
Row = Mapping[str, Any]

_INLINE = re.compile(r"<think>|<tool_call>|<tool_response>")
_THINK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
_CALL_OPEN = re.compile(r"\s*<tool_call>\s*<function=([^>\n]+)>\s*")
_ARGUMENT = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)
_CALL_CLOSE = re.compile(r"</function>\s*</tool_call>\s*")
_RESPONSE = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)
_USER_HEADER = re.compile(r"^<\|im_start\|>user\n")


def detect_format(row: Row, config: DataConfig) -> Format:
    """Return the format of a file, judged by its first row. Raises RowError if none fits."""
    if "messages" in row:
        texts = [m.get("content") for m in _list(row, "messages") if isinstance(m, Mapping)]
        inline = any(isinstance(t, str) and _INLINE.search(t) for t in texts)
        return "nemotron" if inline or "generator" in row else "messages"
    if config.question_field in row and config.answer_field in row:
        return "qa"
    raise RowError(
        f"no known format: fields {sorted(row)} hold neither 'messages' nor "
        f"{config.question_field!r} and {config.answer_field!r}; set data.question_field and "
        "data.answer_field, or data.format"
    )


def parse_row(row: object, fmt: Format, config: DataConfig) -> Conversation:
    """Parse `row` in format `fmt`. Raises RowError with the reason."""
    if not isinstance(row, Mapping):
        raise RowError(f"a row must be an object, this is {_kind(row)}")
    if fmt == "qa":
        conversation = _parse_qa(row, config)
    else:
        turns = _list(row, "messages")
        messages = [m for i, t in enumerate(turns) for m in _parse_message(t, i, fmt)]
        conversation = Conversation(tuple(messages), _parse_tools(row.get("tools")))
    check_conversation(conversation)
    return conversation


def check_conversation(conversation: Conversation) -> None:
    """Raise RowError unless the turns can be rendered and at least one token is trained."""
    messages = conversation.messages
    if not messages:
        raise RowError("no messages")
    for i, message in enumerate(messages):
        if message.role == "system" and i > 0:
            raise RowError(f"message {i}: a system turn must stand first")
        if message.role == "tool" and (i == 0 or messages[i - 1].role not in ("assistant", "tool")):
            raise RowError(f"message {i}: a tool's result must follow an assistant turn")
        if message.role == "assistant":
            if not (message.content or message.reasoning or message.tool_calls):
                raise RowError(f"message {i}: the assistant turn is empty")
        elif message.role == "user" and not message.content:
            raise RowError(f"message {i}: the user turn is empty")
    if not any(m.role == "assistant" and m.trained for m in messages):
        raise RowError("no assistant turn to train on")


def _parse_qa(row: Row, config: DataConfig) -> Conversation:
    messages = []
    if config.system_field:
        messages.append(Message("system", _text(row, config.system_field)))
    messages.append(Message("user", _text(row, config.question_field)))
    messages.append(Message("assistant", _text(row, config.answer_field)))
    return Conversation(tuple(messages))


def _parse_message(turn: object, index: int, fmt: Format) -> list[Message]:
    where = f"message {index}"
    if not isinstance(turn, Mapping):
        raise RowError(f"{where} must be an object, it is {_kind(turn)}")
    role = turn.get("role")
    if role not in ROLES:
        raise RowError(f"{where}: unknown role {role!r}, known are {', '.join(ROLES)}")
    content = _content(turn.get("content"), where)
    if role == "assistant":
        return [_assistant(turn, content, where, inline_calls=fmt == "nemotron")]
    if fmt == "nemotron" and role in ("user", "tool"):
        results = _inline_results(content)
        if results is not None:
            return [Message("tool", text) for text in results]
    return [Message(cast(Role, role), content)]


def _assistant(turn: Row, content: str, where: str, *, inline_calls: bool) -> Message:
    reasoning = ""
    for key in ("reasoning_content", "reasoning"):
        value = turn.get(key)
        if value is not None and not isinstance(value, str):
            raise RowError(f"{where}: {key} must be a string, it is {_kind(value)}")
        reasoning = reasoning or value or ""
    found = _THINK.match(content)
    if found and not reasoning:
        reasoning, content = found.group(1), content[found.end() :]
    calls = _tool_calls(turn.get("tool_calls"), where)
    # A line break next to a think tag or a call belongs to the template, not to the text.
    if reasoning or found:
        content = content.lstrip("\n")
    if inline_calls and not calls:
        content, calls = _inline_calls(content)
    weight = turn.get("weight", 1)
    if weight not in (None, 0, 1):
        raise RowError(f"{where}: weight must be 0 or 1, it is {weight!r}")
    return Message("assistant", content, reasoning.strip("\n"), calls, trained=weight != 0)


def _content(value: object, where: str) -> str:
    """Return the text of a string, of null, or of a list of text parts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowError(f"{where}: content must be text or a list of parts, it is {_kind(value)}")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(part, Mapping) and part.get("type", "text") != "text":
            raise RowError(f"{where}: a part of type {part.get('type')!r}; only text can be read")
        if not isinstance(text, str):
            raise RowError(f"{where}: a part of the content holds no text")
        texts.append(text)
    return "".join(texts)


def _tool_calls(value: object, where: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = _json(value, f"{where}: tool_calls")
    if not isinstance(value, list):
        raise RowError(f"{where}: tool_calls must be a list, it is {_kind(value)}")
    calls = []
    for call in value:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise RowError(f"{where}: a tool call has no name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _json(arguments, f"{where}: arguments of {name}") if arguments else {}
        if not isinstance(arguments, Mapping | None):
            raise RowError(f"{where}: arguments of {name} must be an object")
        calls.append(ToolCall(name, dict(arguments or {})))
    return tuple(calls)


def _parse_tools(value: object) -> tuple[Tool, ...]:
    """Parse the row's `tools`: OpenAI's form, bare functions, or either as a JSON string."""
    if isinstance(value, str):
        value = _json(value, "tools") if value else None
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RowError(f"tools must be a list, it is {_kind(value)}")
    tools = []
    for i, item in enumerate(value):
        function = item.get("function") or item if isinstance(item, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise RowError(f"tools[{i}] has no name")
        parameters = function.get("parameters") or {}
        if isinstance(parameters, str):
            parameters = _json(parameters, f"tools[{i}].parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if not isinstance(parameters, Mapping) or not isinstance(properties, Mapping | None):
            raise RowError(f"tools[{i}].parameters must be a JSON schema of an object")
        tools.append(Tool(name, str(function.get("description") or ""), dict(parameters)))
    return tuple(tools)


def _inline_calls(content: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Split off the calls written at the end of the text; anything that is not a call is kept."""
    start = content.find("<tool_call>")
    while start >= 0:
        calls = _calls_to_end(content, start)
        if calls:
            return content[:start].removesuffix("\n"), calls
        start = content.find("<tool_call>", start + 1)
    return content, ()


def _calls_to_end(content: str, position: int) -> tuple[ToolCall, ...]:
    """The calls that fill `content` from `position` to its end; empty if anything else is there."""
    calls = []
    while position < len(content):
        opened = _CALL_OPEN.match(content, position)
        if not opened:
            return ()
        position = opened.end()
        arguments = {}
        while argument := _ARGUMENT.match(content, position):
            arguments[argument.group(1)] = argument.group(2)
            position = argument.end()
        closed = _CALL_CLOSE.match(content, position)
        if not closed:
            return ()
        calls.append(ToolCall(opened.group(1), arguments))
        position = closed.end()
    return tuple(calls)


def _inline_results(content: str) -> list[str] | None:
    """Tool results written as a user turn, or None if the turn holds anything else."""
    body = _USER_HEADER.sub("", content).strip()
    results, position = [], 0
    while position < len(body):
        found = _RESPONSE.match(body, position)
        if not found:
            return None
        results.append(found.group(1))
        position = found.end()
    return results or None


def _list(row: Row, key: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list):
        raise RowError(f"field {key!r} must be a list, it is {_kind(value)}")
    return value


def _text(row: Row, key: str) -> str:
    if key not in row:
        raise RowError(f"no field {key!r}; the row has {sorted(row)}")
    value = row[key]
    if not isinstance(value, str):
        raise RowError(f"field {key!r} must be a string, it is {_kind(value)}")
    if not value.strip():
        raise RowError(f"field {key!r} is empty")
    return value


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"{what}: not JSON ({error})") from None


def _kind(value: object) -> str:
    return "missing or null" if value is None else type(value).__name__
