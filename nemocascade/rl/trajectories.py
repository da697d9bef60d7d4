"""Rollout logs in RUN/rollouts, and replay of their verification."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

from nemocascade.envs.registry import close_environments, make_environments
from nemocascade.recipe import EnvConfig
from nemocascade.recipe.commands import ReplaySettings
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.rl.collector import UNTRUNCATED_REWARD, Gathered, Group
from nemocascade.rl.rollouts import Transcript
from nemocascade.runtime.jsonl import read_objects
from nemocascade.runtime.row_errors import DataError
from nemocascade.types import Message, Prompt, ToolCall, Verdict


def extremes(group: Group) -> list[int]:
    """Numbers of a group's best and worst rollout, and of the first one without a verdict.

    Only the first of equal ones.
    """
    rewards = {i: r.verdict.reward for i, r in enumerate(group.rollouts)}
    scored = {i: reward for i, reward in rewards.items() if reward is not None}
    failed = [i for i in rewards if i not in scored][:1]
    found = [choose(scored, key=lambda i: scored[i]) for choose in (max, min) if scored]
    return list(dict.fromkeys((*found, *failed)))


def sampled(gathered: Gathered, count: int) -> list[Group]:
    """Up to `count` groups of a step to log.

    Those that train come first, but one place is kept for another, one with errors if there is one.
    """
    training = {group.task.number for group in gathered.groups}
    trained = [group for group in gathered.tried if group.task.number in training]
    others = [group for group in gathered.tried if group.task.number not in training]
    others.sort(key=lambda g: all(r.verdict.error is None for r in g.rollouts))
    return [*trained[: max(1, count - bool(others))], *others][:count]


def logged(step: int, group: Group, number: int, transcript: Transcript) -> dict[str, Any]:
    """Rollout `number` of a group as JSON values. step: counted from 1. transcript: the rollout's.

    An episode with tool calls is logged turn by turn with its verifier's data, so that it can be
    replayed. Episodes whose verifier data is not JSON are logged as text only: these are domains
    without tools, whose answers may still look like calls.
    """
    rollout, prompt = group.rollouts[number], group.task.prompt
    details = transcript.verdict.details
    added = {name: v for name, v in rollout.verdict.details.items() if name not in details}
    line: dict[str, Any] = {
        "step": step,
        "rollout": number,
        "domain": prompt.domain,
        "task": prompt.id,
        "prompt": [{"role": m.role, "content": m.content} for m in prompt.messages],
        "response": transcript.text,
        "truncated": rollout.truncated,
        "reward": rollout.verdict.reward,
        "error": transcript.verdict.error,
        "details": {**details, **added},
        "rewards_of_group": [r.verdict.reward for r in group.rollouts],
    }
    called = any(m.tool_calls or m.role == "tool" for m in transcript.response)
    if called and _is_json(prompt.answer):
        line |= {"turns": [_turn(m) for m in transcript.response], "answer": dict(prompt.answer)}
    return line


def _is_json(answer: Mapping[str, Any]) -> bool:
    try:
        json.dumps(dict(answer))
    except TypeError:
        return False
    return True


def settings_of_run(path: Path) -> ReplaySettings:
    """Replay settings for a file or folder of rollouts, with the `envs` of the run's recipe."""
    folder = path if path.is_dir() else path.parent
    try:
        recipe = json.loads((folder.parent / "recipe.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ReplaySettings(str(path))
    except ValueError as error:
        raise DataError(f"{folder.parent / 'recipe.json'} is not JSON: {error}") from error
    envs = _filled(EnvConfig(), recipe.get("envs", {}))
    # Episodes with tools need no judge, and the run's judge may no longer be available.
    return ReplaySettings(str(path), replace(envs, judge=JudgeConfig()))


def _filled[T](default: T, said: Mapping[str, Any]) -> T:
    """`default` with the values of `said`; settings of another version are ignored."""
    found: dict[str, Any] = {}
    for f in fields(cast(Any, default)):
        if f.name in said:
            old, new = getattr(default, f.name), said[f.name]
            if is_dataclass(old):
                new = _filled(old, new)
            found[f.name] = tuple(new) if isinstance(old, tuple) else new
    return cast(T, replace(cast(Any, default), **found))


@dataclass(frozen=True)
class Replayed:
    """A logged episode: its verifier's logged reward, and its new verdict. where: `file:line`."""

    where: str
    logged: float | None
    verdict: Verdict

    @property
    def same(self) -> bool:
        """True if the rewards are equal, or both are missing."""
        return self.logged == self.verdict.reward


def replay(settings: ReplaySettings) -> list[Replayed]:
    """Verify every logged episode with tool calls again. Raises DataError if there is none."""
    root = Path(settings.path)
    files = sorted(root.glob("*.jsonl")) if root.is_dir() else [root]
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is not a file: name one of RUN/rollouts, or that folder")
        try:
            rows += read_objects(file)
        except ValueError as error:
            raise DataError(str(error)) from error
    chosen = [(where, row) for where, row in rows if "turns" in row]
    if not chosen:
        raise DataError(f"{root}: none of its {len(rows)} rollouts has calls of tools")
    environments = make_environments(settings.envs)
    try:
        found = []
        for where, row in chosen:
            if row["domain"] not in environments:
                raise DataError(f"{where}: {row['domain']!r} is not a domain")
            environment = environments[row["domain"]]
            verdict = environment.score(_prompt(row), [_message(t) for t in row["turns"]])
            verified = row.get("details", {}).get(UNTRUNCATED_REWARD, row["reward"])
            found.append(Replayed(where, verified, verdict))
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
