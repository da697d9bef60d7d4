"""Parser of an assistant's reply to a message: the inverse of the chat template."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nemocascade.types import Message, ToolCall

_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\n(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n(.*?)\n</parameter>\s*", re.DOTALL)
_END = "<|im_end|>"


@dataclass(frozen=True)
class Reply:
    """One assistant turn. faults: for each unreadable call, what is wrong with it."""

    message: Message
    faults: tuple[str, ...] = ()


def parse_reply(text: str, *, thinking: bool) -> Reply:
    """Parse the text after the generation prompt, up to the end of the turn.

    thinking: the prompt opened a reasoning block. If it is never closed, the content is empty.
    Parameter values stay text. Never raises: a malformed call is a fault, stays in the content, and
    is not executed.
    """
    text = text.split(_END, 1)[0]
    reasoning = ""
    if thinking:
        reasoning, closed, text = text.partition("</think>")
        if not closed:
            return Reply(Message("assistant", "", reasoning.strip("\n")))
        text = text.removeprefix("\n")
    calls: list[ToolCall] = []
    faults: list[str] = []

    def take(match: re.Match[str]) -> str:
        call = _parse_call(match.group(1))
        if isinstance(call, ToolCall) and match.group(0).endswith("</tool_call>"):
            calls.append(call)
            return ""
        faults.append(call if isinstance(call, str) else "a call is not closed by </tool_call>")
        return match.group(0)

    content = _BLOCK.sub(take, text)
    if calls or faults:
        content = content.rstrip("\n")
    return Reply(Message("assistant", content, reasoning.strip("\n"), tuple(calls)), tuple(faults))


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
