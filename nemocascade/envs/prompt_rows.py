"""Prompts of released rows: the turns before the answer, the tools, and the pass rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemocascade.runtime.turns import (
    kind_of,
    parse_content,
    parse_role,
    parse_tool_calls,
    parse_tools,
)
from nemocascade.types import Message, Row, Tool


def turns_of(row: Row) -> tuple[tuple[Message, ...], tuple[Tool, ...]]:
    """Return the turns and the tools of `responses_create_params`, or the turns of `prompt`.

    Raises ValueError if there are none, or they do not end with a user or a tool.
    """
    params = row.get("responses_create_params") or {}
    turns = params.get("input") or row.get("prompt")
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not turns:
        raise ValueError("'responses_create_params.input' and 'prompt' are both empty")
    if not isinstance(turns, list):
        raise ValueError(f"the prompt must be a text or a list of turns, it is {kind_of(turns)}")
    messages = tuple(_message(turn, f"turn {i} of the prompt") for i, turn in enumerate(turns))
    if messages[-1].role not in ("user", "tool"):
        raise ValueError(f"the prompt ends with a turn of {messages[-1].role}, not of the user")
    return messages, parse_tools(params.get("tools"))


def pass_rate_of(row: Row) -> float | None:
    """Return the fraction of earlier attempts that solved the task; None if it is unknown."""
    rate = row.get("pass_rate")
    if rate is not None and not 0 <= float(rate) <= 1:
        raise ValueError(f"'pass_rate' is {rate}, a share of tries lies in 0..1")
    return None if rate is None else float(rate)


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} must be an object, it is {kind_of(turn)}")
    role = parse_role(turn.get("role"), where)
    content = parse_content(turn.get("content"), where)
    if role == "user" and not content:
        raise ValueError(f"{where} is empty")
    return Message(role, content, tool_calls=parse_tool_calls(turn.get("tool_calls"), where))
