"""Rows for SFT made from the demonstrations of procedural tasks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemocascade.envs.base import Domain, demonstration
from nemocascade.types import Message, Prompt


def sft_row(prompt: Prompt, *, thinking: bool, careless: bool = False) -> dict[str, Any]:
    """The task and its demonstration as a row of the `messages` format.

    Without `thinking` the row holds no reasoning and so renders with empty think tags. careless:
    see `envs.base.demonstration`. Raises ValueError for a task without a demonstration.
    """
    turns = [*prompt.messages, *demonstration(prompt, thinking=thinking, careless=careless)]
    row: dict[str, Any] = {"messages": [_turn(message) for message in turns]}
    if prompt.tools:
        row["tools"] = [
            {"name": t.name, "description": t.description, "parameters": dict(t.parameters)}
            for t in prompt.tools
        ]
    return row


def sft_rows(
    domains: Mapping[Domain, int], *, seed: int, difficulty: int = 0, thinking: float = 0.5
) -> Iterator[dict[str, Any]]:
    """Rows of training tasks, none held out, in random order.

    domains: how many rows of each. thinking: share of rows with reasoning.
    """
    rng = random.Random(f"demonstrations/{seed}")
    prompts = [
        prompt
        for domain, count in domains.items()
        for prompt in domain.prompts(seed=seed, count=count, difficulty=difficulty)
    ]
    rng.shuffle(prompts)
    for prompt in prompts:
        yield sft_row(prompt, thinking=rng.random() < thinking)


def write_sft_rows(
    path: str | Path,
    domains: Mapping[Domain, int],
    *,
    seed: int,
    difficulty: int = 0,
    thinking: float = 0.5,
) -> None:
    """`sft_rows` as a JSONL file."""
    rows = sft_rows(domains, seed=seed, difficulty=difficulty, thinking=thinking)
    with Path(path).open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        turn["reasoning_content"] = message.reasoning
    if message.tool_calls:
        turn["tool_calls"] = [
            {"function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.tool_calls
        ]
    return turn
