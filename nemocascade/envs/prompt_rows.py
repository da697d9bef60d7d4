"""Fields that released rows of all domains share: prompt, tools, pass rate, verifier metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemocascade.runtime.strict_json import parse_field
from nemocascade.runtime.turns import (
    kind_of,
    parse_content,
    parse_role,
    parse_tool_calls,
    parse_tools,
)
from nemocascade.types import Message, Row, Tool

METADATA = "verifier_metadata"
"""Field in which rows of NeMo Gym may carry what their verifier reads."""


def flattened(row: Row) -> Row:
    """Return the row with the fields of `verifier_metadata` beside its own.

    Raises ValueError for a field that has another value in the row itself.
    """
    inner = row.get(METADATA)
    if isinstance(inner, str):
        inner = parse_field(inner, METADATA) if inner else None
    if inner is None:
        return row
    if not isinstance(inner, Mapping):
        raise ValueError(f"{METADATA} must be an object, it is {kind_of(inner)}")
    given = {key: value for key, value in inner.items() if value is not None}
    twice = sorted(k for k, v in given.items() if row.get(k) is not None and row[k] != v)
    if twice:
        raise ValueError(
            f"the fields {twice} have one value in the row and another in {METADATA}: keep one"
        )
    return {**row, **given}


def turns_of(row: Row) -> tuple[tuple[Message, ...], tuple[Tool, ...]]:
    """Return the turns and the tools of `responses_create_params`, or the turns of `prompt`.

    Calls, their results and reasoning may be items of their own, as in OpenAI's Responses API, and
    `instructions` is a system turn. Raises ValueError if there are no turns, or they do not end
    with a user or a tool.
    """
    params = row.get("responses_create_params") or {}
    turns = params.get("input") or row.get("prompt")
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not turns:
        raise ValueError("'responses_create_params.input' and 'prompt' are both empty")
    if not isinstance(turns, list):
        raise ValueError(f"the prompt must be a text or a list of turns, it is {kind_of(turns)}")
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        _append(messages, turn, f"turn {i} of the prompt")
    if system := parse_content(params.get("instructions"), "instructions"):
        if any(m.role == "system" for m in messages):
            raise ValueError("the prompt has 'instructions' and a system turn: keep one")
        messages.insert(0, Message("system", system))
    if messages[-1].role not in ("user", "tool"):
        raise ValueError(f"the prompt ends with a turn of {messages[-1].role}, not of the user")
    return tuple(messages), parse_tools(params.get("tools"))


def pass_rate_of(row: Row) -> float | None:
    """Return the fraction of earlier attempts that solved the task; None if it is unknown."""
    rate = row.get("pass_rate")
    try:
        share = None if rate is None else float(rate)
    except OverflowError:
        share = math.inf
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"'pass_rate' is {str(rate)[:80]}, a share of tries is in 0..1")
    return share


def _append(messages: list[Message], turn: Any, where: str) -> None:
    """Append a turn, or add a reasoning or a call to the assistant's turn that it belongs to."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} must be an object, it is {kind_of(turn)}")
    kind = turn.get("type")
    if kind == "function_call_output":
        messages.append(Message("tool", parse_content(turn.get("output"), where)))
        return
    if kind not in ("function_call", "reasoning"):
        message = _message(turn, where)
        last = messages[-1] if messages else None
        if last and message.role == last.role == "assistant" and _is_reasoning(last):
            messages[-1] = replace(message, reasoning=last.reasoning)
        else:
            messages.append(message)
        return
    if kind == "reasoning":
        parts = turn.get("summary") or turn.get("content") or []
        text = "\n".join(part["text"] for part in parts)
        messages.append(Message("assistant", "", reasoning=text))
        return
    last = messages[-1] if messages and messages[-1].role == "assistant" else None
    calls = parse_tool_calls([turn], where)
    if last is None:
        messages.append(Message("assistant", "", tool_calls=calls))
    else:
        messages[-1] = replace(last, tool_calls=last.tool_calls + calls)


def _is_reasoning(message: Message) -> bool:
    return not message.content and not message.tool_calls


def _message(turn: Mapping[str, Any], where: str) -> Message:
    role = parse_role(turn.get("role"), where)
    content = parse_content(turn.get("content"), where)
    if role == "user" and not content:
        raise ValueError(f"{where} is empty")
    return Message(role, content, tool_calls=parse_tool_calls(turn.get("tool_calls"), where))
