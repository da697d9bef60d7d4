"""Statistics of a step's rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch

from nemocascade.rl.collector import Gathered, Group
from nemocascade.rl.rollouts import Rollout, Transcript
from nemocascade.types import Environment, Fault

FAULTS: tuple[Fault, ...] = get_args(Fault)
DECILES = torch.linspace(0, 1, 11, dtype=torch.float64)
FAULT_ALARM = 0.05
"""A larger share of checks that could not finish, by cause, is a warning."""


def rollout_values(
    gathered: Gathered, seconds: float, environments: Mapping[str, Environment]
) -> dict[str, Any]:
    """Rollout metrics of a step for metrics.jsonl. seconds: time of generation and verification."""
    rollouts = [r for g in gathered.tried for r in g.rollouts]
    rewards = [r.verdict.reward for r in rollouts if r.verdict.reward is not None]
    lengths = torch.tensor([r.length for r in rollouts], dtype=torch.float64)
    by_domain: dict[str, list[float]] = {}
    for group in gathered.tried:
        scored = [r.verdict.reward for r in group.rollouts if r.verdict.reward is not None]
        by_domain.setdefault(group.task.prompt.domain, []).extend(scored)
    values: dict[str, Any] = {
        "rollout_time_s": seconds,
        "reward": _mean(rewards),
        "response_tokens": float(lengths.mean()),
        "response_tokens_max": float(lengths.max()),
        "response_tokens_deciles": torch.quantile(lengths, DECILES).tolist(),
        "truncated": _mean([float(r.truncated) for r in rollouts]),
        "repetition": _mean([r.repetition for r in rollouts]),
        "turns": _mean([float(r.turns) for r in rollouts]),
        "verifier_errors": sum(r.verdict.reward is None and r.is_scored for r in rollouts),
        "groups": len(gathered.groups),
        "groups_drawn": gathered.drawn,
        "groups_masked": gathered.masked,
        "groups_ahead": gathered.ahead,
    }
    absolute = [g for g in gathered.tried if not environments[g.task.prompt.domain].by_group]
    if absolute:
        values["groups_all_right"] = _share(absolute, low=1.0)
        values["groups_all_wrong"] = _share(absolute, high=0.0)
    values |= fault_shares(rollouts) | _judged(rollouts)
    if len(by_domain) > 1:
        values |= {f"reward/{name}": _mean(r) for name, r in sorted(by_domain.items())}
        for name in sorted(by_domain):
            values |= _of_domain(name, gathered)
    return values


def _of_domain(name: str, gathered: Gathered) -> dict[str, Any]:
    """Metrics of one domain of several. groups: those that train; groups_drawn: all."""
    tried = [g for g in gathered.tried if g.task.prompt.domain == name]
    rollouts = [r for g in tried for r in g.rollouts]
    return {
        f"groups/{name}": sum(g.task.prompt.domain == name for g in gathered.groups),
        f"groups_drawn/{name}": len(tried),
        f"response_tokens/{name}": _mean([float(r.length) for r in rollouts]),
        f"truncated/{name}": _mean([float(r.truncated) for r in rollouts]),
    }


def fault_shares(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Fractions of the verified rollouts whose check could not finish, by cause.

    Errors of an unknown cause, such as a judge's, count as the host's.
    """
    verdicts = [r.verdict for r in rollouts if r.is_scored]
    faults = [v.fault or ("host" if v.reward is None else None) for v in verdicts]
    return {f"faults/{name}": faults.count(name) / len(faults) for name in FAULTS if faults}


def fault_examples(
    gathered: Gathered, values: Mapping[str, Any]
) -> dict[Fault, tuple[str, Rollout]]:
    """The first rollout whose check could not finish, and the origin of its task, for every cause
    above `FAULT_ALARM`. values: from `rollout_values`."""
    rollouts = [(g.task.prompt.source, r) for g in gathered.tried for r in g.rollouts]
    return {
        name: next(
            (source, r)
            for source, r in rollouts
            if (r.verdict.fault or "host") == name and r.is_scored
            if r.verdict.fault or r.verdict.reward is None
        )
        for name in FAULTS
        if values.get(f"faults/{name}", 0.0) > FAULT_ALARM
    }


def faults_text(
    step: int,
    examples: Mapping[Fault, tuple[str, Rollout]],
    values: Mapping[str, Any],
    transcripts: Sequence[Transcript],
) -> str:
    """Return a warning about every cause with an example; empty for none.

    examples: from `fault_examples`. transcripts: theirs, in order; [] on other ranks than the main.
    """
    found = []
    for (name, (source, _)), text in zip(examples.items(), transcripts, strict=False):
        example = f"{source}: {text.verdict.error or text.verdict.details}"
        found.append(f"{values[f'faults/{name}']:.0%} because of the {name} ({example[:200]})")
    if not found:
        return ""
    return f"step {step}: checks of answers could not finish: {'; '.join(found)}"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _share(
    groups: Sequence[Group], *, low: float | None = None, high: float | None = None
) -> float:
    """Fraction of groups whose rewards are all at least `low`, or all at most `high`."""
    count = 0
    for group in groups:
        rewards = [r.verdict.reward for r in group.rollouts if r.verdict.reward is not None]
        if rewards:
            count += (low is not None and min(rewards) >= low) or (
                high is not None and max(rewards) <= high
            )
    return count / max(1, len(groups))


def _judged(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Fractions of comparisons without an answer, and with an answer that does not parse."""
    details = [r.verdict.details for r in rollouts if "unanswered" in r.verdict.details]
    unanswered = sum(d["unanswered"] for d in details)
    asked = unanswered + sum(d.get("pairs", 0) for d in details)
    if not asked:
        return {}
    return {
        "judge_unanswered": unanswered / asked,
        "judge_unparsed": sum(d["unparsed"] for d in details) / asked,
    }
