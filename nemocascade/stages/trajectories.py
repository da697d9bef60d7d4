"""Rollouts as they are logged in RUN/rollouts, and scored again from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemocascade.data.errors import DataError
from nemocascade.envs.registry import DOMAINS, close_environments, make_environments
from nemocascade.recipe import EnvConfig
from nemocascade.stages.experience import Group
from nemocascade.types import Message, Prompt, ToolCall, Verdict


def logged(step: int, group: Group) -> dict[str, Any]:
    """The first rollout of a group, in JSON values.

    An episode with calls is logged turn by turn, and with what its verifier needs, so that it can
    be scored again.
    """
    rollout, prompt = group.rollouts[0], group.task.prompt
    line: dict[str, Any] = {
        "step": step,
        "domain": prompt.domain,
        "task": prompt.id,
        "prompt": [{"role": m.role, "content": m.content} for m in prompt.messages],
        "response": rollout.text,
        "truncated": rollout.truncated,
        "reward": rollout.verdict.reward,
        "error": rollout.verdict.error,
        "details": dict(rollout.verdict.details),
        "rewards_of_group": [r.verdict.reward for r in group.rollouts],
    }
    if any(m.tool_calls for m in rollout.response):
        line |= {"turns": [_turn(m) for m in rollout.response], "answer": dict(prompt.answer)}
    return line


@dataclass(frozen=True)
class ReplaySettings:
    """Score logged episodes again, and compare."""

    path: str = ""
    """A file of RUN/rollouts, or the folder."""

    envs: EnvConfig = field(default_factory=EnvConfig)
    """As in the run."""


@dataclass(frozen=True)
class Replayed:
    """A logged episode and its two verdicts. where: `file:line`."""

    where: str
    logged: float | None
    verdict: Verdict

    @property
    def same(self) -> bool:
        """The rewards are equal, or there was none both times."""
        return self.logged == self.verdict.reward


def replay(settings: ReplaySettings) -> list[Replayed]:
    """Every logged episode with calls, scored again. Raises DataError where there is none."""
    root = Path(settings.path)
    files = sorted(root.glob("*.jsonl")) if root.is_dir() else [root]
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is no file: name one of RUN/rollouts, or that folder")
        lines = file.read_text(encoding="utf-8").splitlines()
        rows += [(f"{file.name}:{n}", json.loads(line)) for n, line in enumerate(lines, start=1)]
    chosen = [(where, row) for where, row in rows if "turns" in row]
    if not chosen:
        raise DataError(f"{root}: none of its {len(rows)} rollouts has calls of tools")
    environments = make_environments(settings.envs)
    try:
        found = []
        for where, row in chosen:
            if row["domain"] not in DOMAINS:
                raise DataError(f"{where}: {row['domain']!r} is no domain")
            environment = environments[row["domain"]]
            verdict = environment.score(_prompt(row), [_message(t) for t in row["turns"]])
            found.append(Replayed(where, row["reward"], verdict))
        return found
    finally:
        close_environments(environments)


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        turn["reasoning"] = message.reasoning
    if message.tool_calls:
        turn["calls"] = [{"name": c.name, "arguments": c.arguments} for c in message.tool_calls]
    return turn


def _message(turn: Mapping[str, Any]) -> Message:
    calls = tuple(ToolCall(c["name"], c["arguments"]) for c in turn.get("calls", ()))
    return Message(turn["role"], turn["content"], turn.get("reasoning", ""), calls)


def _prompt(row: Mapping[str, Any]) -> Prompt:
    messages = tuple(Message(m["role"], m["content"]) for m in row["prompt"])
    return Prompt(row["task"], row["domain"], messages, row["answer"])
