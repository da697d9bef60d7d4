"""Parser of an assistant's reply to a message: the inverse of the chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nemocascade.runtime.row_errors import RowError
from nemocascade.runtime.strict_json import parse_field
from nemocascade.types import Message, ToolCall

_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\n(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n(.*?)\n</parameter>\s*", re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """One assistant turn. faults: for each unreadable call, what is wrong with it."""

    message: Message
    faults: tuple[str, ...] = ()


def parse_reply(
    text: str,
    *,
    reasoning: Literal["open", "closed", "free"],
    ends: Sequence[str],
    json_calls: bool = False,
    with_calls: bool = True,
) -> Reply:
    """Parse the text after the generation prompt, up to the first of `ends`.

    reasoning: whether the prompt opened a reasoning block, closed it, or left it to the assistant.
    If a block is never closed, the content is empty. json_calls: calls are JSON objects in
    `<tool_call>` blocks, else functions with parameters. with_calls: False leaves calls in the
    content. Parameter values stay text. Never raises: a malformed call is a fault, stays in the
    content, and is not executed.
    """
    for end in ends:
        text = text.split(end, 1)[0]
    opened = reasoning == "open"
    if reasoning == "free" and text.lstrip().startswith("<think>"):
        opened, text = True, text.lstrip().removeprefix("<think>")
    thought = ""
    if opened:
        thought, closed, text = text.partition("</think>")
        if not closed:
            return Reply(Message("assistant", "", thought.strip("\n")))
        text = text.removeprefix("\n")
    calls: list[ToolCall] = []
    faults: list[str] = []

    def take(match: re.Match[str]) -> str:
        call = (_parse_json if json_calls else _parse_call)(match.group(1))
        if isinstance(call, ToolCall) and match.group(0).endswith("</tool_call>"):
            calls.append(call)
            return ""
        faults.append(call if isinstance(call, str) else "a call is not closed by </tool_call>")
        return match.group(0)

    content = _BLOCK.sub(take, text) if with_calls else text
    if calls or faults:
        content = content.rstrip("\n")
    return Reply(Message("assistant", content, thought.strip("\n"), tuple(calls)), tuple(faults))


def _parse_call(block: str) -> ToolCall | str:
    """Return the call, or a message that says what is wrong with it."""
    function = _FUNCTION.fullmatch(block)
    if function is None:
        return "a call must be <function=NAME>, its parameters and </function>, each on its line"
    name, body = function.group(1).strip(), function.group(2)
    arguments: dict[str, str] = {}
    at, end = 0, len(body.rstrip())
    while at < end:
        parameter = _PARAMETER.match(body, at)
        if parameter is None:
            return f"{name}: a parameter must be <parameter=NAME>, its value and </parameter>"
        if parameter.group(1) in arguments:
            return f"{name}: parameter {parameter.group(1)} is given twice"
        arguments[parameter.group(1)] = parameter.group(2)
        at = parameter.end()
    return ToolCall(name, arguments)


def _parse_json(block: str) -> ToolCall | str:
    """Return the call, or a message that says what is wrong with it."""
    try:
        call = parse_field(block, "the call")
    except RowError as error:
        return f"a call must be a JSON object: {error}"
    call = call if isinstance(call, dict) else {}
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return 'a call must be {"name": NAME, "arguments": {PARAMETER: VALUE}}'
    plain = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
    return ToolCall(name, plain)
