"""Parsing of rows in the known formats to `Conversation`.

`messages`  chat turns in OpenAI's form, reasoning in its own field or in think tags.
`sharegpt`  `conversations`: turns with `from` and `value`; tool calls are turns of their own.
`qa`        a question field and an answer field.
`nemotron`  released Nemotron-Cascade SFT rows: `messages` whose calls, results and reasoning may be
            written inside the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from nemocascade.data.chat_template import Conversation
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime.row_errors import RowError
from nemocascade.runtime.strict_json import parse_field
from nemocascade.runtime.turns import (
    kind_of,
    parse_content,
    parse_role,
    parse_tool_calls,
    parse_tools,
)
from nemocascade.types import Message, Row, ToolCall

Format = Literal["messages", "qa", "nemotron", "sharegpt"]
_FIELDS = ("messages", "conversations", "system", "tools", "generator")

_INLINE = re.compile(r"<think>|<tool_call>|<tool_response>")
_THINK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
_CALL_OPEN = re.compile(r"\s*<tool_call>\s*<function=([^>\n]+)>\s*")
_ARGUMENT = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)
_CALL_CLOSE = re.compile(r"</function>\s*</tool_call>\s*")
_RESPONSE = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_USER_HEADER = re.compile(r"^<\|im_start\|>user\n")


def row_fields(config: DataConfig) -> set[str]:
    """Return the names of the fields that rows of any format are read from."""
    return {*_FIELDS, config.question_field, config.answer_field, config.system_field} - {""}


def detect_format(row: Row, config: DataConfig) -> Format:
    """Return the format of a file, judged by its first row. Raises RowError if none fits."""
    if "messages" in row:
        turns = row["messages"]
        found = turns if isinstance(turns, list) else [{"content": turns}]
        texts = [m.get("content") for m in found if isinstance(m, Mapping)]
        inline = any(isinstance(t, str) and _INLINE.search(t) for t in texts)
        return "nemotron" if inline or "generator" in row else "messages"
    if "conversations" in row:
        return "sharegpt"
    if config.question_field in row and config.answer_field in row:
        return "qa"
    raise RowError(
        f"no known format: fields {sorted(row)} hold neither 'messages' nor 'conversations' nor "
        f"{config.question_field!r} and {config.answer_field!r}; set data.question_field and "
        "data.answer_field, or data.format"
    )


def parse_row(row: object, fmt: Format, config: DataConfig) -> Conversation:
    """Parse `row` in format `fmt`. Raises RowError with the reason."""
    if not isinstance(row, Mapping):
        raise RowError(f"a row must be an object, this is {kind_of(row)}")
    if fmt == "qa":
        conversation = _parse_qa(row, config)
    else:
        turns = _sharegpt(row) if fmt == "sharegpt" else _list(row, "messages")
        messages = [m for i, t in enumerate(turns) for m in _parse_message(t, i, fmt)]
        conversation = Conversation(tuple(messages), parse_tools(row.get("tools")))
    check_conversation(conversation)
    return conversation


def parse_turns(turns: object) -> tuple[Message, ...]:
    """Parse a list of chat turns in OpenAI's form. Raises RowError with the reason."""
    if not isinstance(turns, list) or not turns:
        raise RowError(f"messages must be a list of at least one turn, it is {kind_of(turns)}")
    return tuple(m for i, t in enumerate(turns) for m in _parse_message(t, i, "messages"))


def check_conversation(conversation: Conversation) -> None:
    """Raise RowError unless the turns can be rendered and at least one token is trained."""
    messages = conversation.messages
    if not messages:
        raise RowError("no messages")
    for i, message in enumerate(messages):
        if message.role == "system" and i > 0:
            raise RowError(f"message {i}: a system turn must come first")
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
        raise RowError(f"{where} must be an object, it is {kind_of(turn)}")
    role = parse_role(turn.get("role"), where)
    content = parse_content(turn.get("content"), where)
    if role == "assistant":
        return [_assistant(turn, content, where, inline_calls=fmt == "nemotron")]
    if fmt == "nemotron" and role in ("user", "tool"):
        results = _inline_results(content)
        if results is not None:
            return [Message("tool", text) for text in results]
    return [Message(role, content)]


def _sharegpt(row: Row) -> list[Any]:
    """Return the turns of `conversations`, with those of `system`, in OpenAI's form."""
    turns = [_openai_turn(turn, i) for i, turn in enumerate(_list(row, "conversations"))]
    system = parse_content(row.get("system"), "system")
    return [{"role": "system", "content": system}, *turns] if system else turns


def _openai_turn(turn: object, index: int) -> object:
    if not isinstance(turn, Mapping) or "role" in turn:
        return turn
    said, value = turn.get("from"), turn.get("value")
    if said != "function_call":
        role = _SHAREGPT_ROLES.get(said, said) if isinstance(said, str) else said
        return {**turn, "role": role, "content": value}
    where = f"message {index}: function_call"
    calls = parse_field(value, where) if isinstance(value, str) else value
    return {
        **turn,
        "role": "assistant",
        "tool_calls": calls if isinstance(calls, list) else [calls],
    }


def _assistant(turn: Row, content: str, where: str, *, inline_calls: bool) -> Message:
    reasoning = ""
    for key in ("reasoning_content", "reasoning"):
        value = turn.get(key)
        if value is not None and not isinstance(value, str):
            raise RowError(f"{where}: {key} must be a string, it is {kind_of(value)}")
        reasoning = reasoning or value or ""
    found = _THINK.match(content)
    if found and not reasoning:
        reasoning, content = found.group(1), content[found.end() :]
    calls = parse_tool_calls(turn.get("tool_calls"), where)
    # A line break next to a think tag or a call belongs to the template, not to the text.
    if reasoning or found:
        content = content.lstrip("\n")
    if inline_calls and not calls:
        content, calls = _inline_calls(content)
    weight = turn.get("weight", 1)
    if weight not in (None, 0, 1):
        raise RowError(f"{where}: weight must be 0 or 1, it is {weight!r}")
    return Message("assistant", content, reasoning.strip("\n"), calls, trained=weight != 0)


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
    if isinstance(value, str):
        value = parse_field(value, f"field {key!r}")
    if not isinstance(value, list):
        raise RowError(f"field {key!r} must be a list, it is {kind_of(value)}")
    return value


def _text(row: Row, key: str) -> str:
    if key not in row:
        raise RowError(f"no field {key!r}; the row has {sorted(row)}")
    value = row[key]
    if not isinstance(value, str):
        raise RowError(f"field {key!r} must be a string, it is {kind_of(value)}")
    if not value.strip():
        raise RowError(f"field {key!r} is empty")
    return value
