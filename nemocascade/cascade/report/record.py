"""Records of a run, as read from its complete or incomplete files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemocascade.cascade.records import Alarm, Teacher
from nemocascade.stages.domain_score import DomainScore

Curve = Sequence[tuple[int, float]]
"""(step from 1, value) pairs with rising steps and finite values."""


@dataclass(frozen=True)
class Fault:
    """Missing or unreadable data of the run folder. file: path relative to the run folder."""

    file: str
    what: str
    count: int = 1


@dataclass(frozen=True)
class Sample:
    """A response to a task. Texts may be cut in the middle, with a note at the cut.

    prompt: (role, content) of each turn. task: id of the prompt, the same in every stage.
    step: step of the stage, for a training rollout.
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
    """One stage of the cascade. Empty fields are missing, or not written yet.

    start: name of the stage that it started from, "" for none. side: a branch that later stages
    don't start from. domains: domains of its rollouts. curves: metrics.jsonl by name.
    rollouts: samples of its first and last logged step. stale: why a full run would make the stage
    again, "" if it would not. scoring_s: time of its held-out scores.
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
    stale: str = ""
    scoring_s: float = 0.0

    def ends(self, name: str) -> tuple[float, float] | None:
        """Means of a measure over the first and the last fifth of its steps, at least two each;
        None for fewer than four."""
        values = [value for _, value in self.curves.get(name, ())]
        if len(values) < 4:
            return None
        part = max(2, len(values) // 5)
        return sum(values[:part]) / part, sum(values[-part:]) / part


@dataclass(frozen=True)
class Run:
    """A cascade run. teachers: teachers by the domain that they teach."""

    name: str
    stages: tuple[Stage, ...]
    teachers: Mapping[str, Teacher]
    alarms: tuple[Alarm, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, Any]
    faults: tuple[Fault, ...]

    @property
    def is_finished(self) -> bool:
        """True if every stage is done."""
        return all(stage.status == "done" for stage in self.stages)

    @property
    def domains(self) -> tuple[str, ...]:
        """Scored domains, in the order in which stages train them, then by name."""
        scored = {name for stage in self.stages for name in stage.scores}
        trained = [d for s in self.stages if s.kind != "sft" for d in s.domains if d in scored]
        return tuple(dict.fromkeys([*trained, *sorted(scored)]))

    @property
    def scored(self) -> tuple[Stage, ...]:
        """Stages that have scores."""
        return tuple(s for s in self.stages if s.scores)

    @property
    def main_line(self) -> tuple[Stage, ...]:
        """Scored stages that are not on a side branch."""
        return tuple(s for s in self.scored if not s.side)

    def stage(self, name: str) -> Stage | None:
        """The stage of that name."""
        return next((s for s in self.stages if s.name == name), None)

    def number(self, name: str) -> int:
        """Place of a stage in the order in which they run, as in the progress line."""
        return [s.name for s in self.stages].index(name) + 1

    def in_points(self, domain: str) -> bool:
        """True if all scores of a domain are in 0..1; they are then shown times 100."""
        values = [s.scores[domain].score for s in self.scored if domain in s.scores]
        return all(value is None or 0 <= value <= 1 for value in values)
