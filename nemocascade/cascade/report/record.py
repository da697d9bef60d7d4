"""The run that a report is about: the values that its files hold, whole or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemocascade.cascade.records import Alarm, Teacher
from nemocascade.stages.scoring import DomainScore

Curve = Sequence[tuple[int, float]]
"""(step from 0, value), rising steps, finite values."""


@dataclass(frozen=True)
class Fault:
    """Something that the run folder lacks or that cannot be read. file: relative to the run."""

    file: str
    what: str
    count: int = 1


@dataclass(frozen=True)
class Sample:
    """A response to a task. Texts may be cut in the middle, and then say so.

    prompt: (role, content) of each turn. task: names the prompt, the same in every stage.
    step: of the stage, where it is a rollout of training.
    """

    domain: str
    task: str
    prompt: tuple[tuple[str, str], ...]
    response: str
    reward: float | None
    error: str | None
    step: int | None = None


@dataclass(frozen=True)
class Stage:
    """One stage, in the order of the cascade. Empty fields: not there, or not there yet.

    start: name of the stage that it started from, "" for none. side: a branch that later stages
    don't start from. domains: those of its rollouts. curves: metrics.jsonl by name.
    rollouts: of its first and last kept step.
    """

    name: str
    kind: str
    start: str
    side: bool
    status: str
    digest: str
    seconds: float | None
    tokens: int | None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    domains: tuple[str, ...] = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    scores: Mapping[str, DomainScore] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    rollouts: Sequence[Sample] = ()


@dataclass(frozen=True)
class Run:
    """A cascade run. teachers: by the domain that they teach."""

    name: str
    stages: tuple[Stage, ...]
    teachers: Mapping[str, Teacher]
    alarms: tuple[Alarm, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, Any]
    faults: tuple[Fault, ...]

    @property
    def domains(self) -> tuple[str, ...]:
        """Every scored domain: in the order in which stages train them, then by name."""
        scored = {name for stage in self.stages for name in stage.scores}
        trained = [d for s in self.stages if s.kind != "sft" for d in s.domains if d in scored]
        return tuple(dict.fromkeys([*trained, *sorted(scored)]))

    @property
    def scored(self) -> tuple[Stage, ...]:
        """Stages that have scores."""
        return tuple(s for s in self.stages if s.scores)

    @property
    def main_line(self) -> tuple[Stage, ...]:
        """Scored stages that are no side branch."""
        return tuple(s for s in self.scored if not s.side)

    def stage(self, name: str) -> Stage | None:
        """The stage of that name."""
        return next((s for s in self.stages if s.name == name), None)

    def in_points(self, domain: str) -> bool:
        """True if all scores of a domain lie in 0..1: they are shown times 100."""
        values = [s.scores[domain].score for s in self.scored if domain in s.scores]
        return all(value is None or 0 <= value <= 1 for value in values)
