"""Time of each stage, by phase."""

from __future__ import annotations

from dataclasses import dataclass

from nemocascade.cascade.report import words
from nemocascade.cascade.report.record import Run, Stage

PHASES = (
    ("rollout", "generation of responses"),
    ("verify", "waiting for verdicts after the last response, and judges on the training ranks"),
    ("teacher", "log-probabilities of teachers"),
    ("train", "forward, backward and optimizer"),
    ("wait", "no response in progress, while tools of episodes run"),
    ("rest", "start, data, checkpoints, held-out evaluations"),
    ("score", "held-out scores of the artifact, after the stage"),
)
"""Name and meaning of each phase, in the order of a step."""


@dataclass(frozen=True)
class Share:
    """A phase of a stage. share: of the stage's time with its scores, 0..1. number: in `PHASES`."""

    phase: str
    number: int
    seconds: float
    share: float

    @property
    def text(self) -> str:
        """For example `rollout 41 s, 63 %`."""
        return f"{self.phase} {words.duration(self.seconds)}, {100 * self.share:.0f} %"


def phase_seconds(stage: Stage) -> dict[str, float]:
    """Seconds of each phase on the main rank; phases overlap with verification, which is therefore
    counted only while nothing else runs. {} without a step."""

    def total(name: str) -> float:
        curve = stage.curves.get(name, ())
        if not curve:
            return 0.0
        # With log.every above 1, the lines represent all steps.
        steps = max(points[-1][0] for points in stage.curves.values() if points)
        return sum(value for _, value in curve) * max(1.0, steps / len(curve))

    steps_s = total("step_time_s")
    if not steps_s and not total("rollout_time_s"):
        return {}
    generation, waits = total("generation_time_s"), total("idle_time_s")
    rollout = total("rollout_time_s")
    found = {
        # Rollout servers, and older runs, tell only the time of both.
        "rollout": generation - min(waits, generation) if generation else rollout,
        "verify": max(0.0, rollout - generation) if generation else 0.0,
        "teacher": total("teacher_time_s"),
        "train": total("train_time_s") if rollout else steps_s,
        "wait": min(waits, generation),
    }
    rest = max(stage.seconds or 0.0, steps_s) - sum(found.values())
    return {**found, "rest": max(0.0, rest), "score": stage.scoring_s}


def shares(seconds: dict[str, float]) -> list[Share]:
    """The phases that took any time, in order."""
    whole = sum(seconds.values())
    return [
        Share(name, number, seconds[name], seconds[name] / whole)
        for number, (name, _) in enumerate(PHASES)
        if seconds.get(name, 0.0) > 0
    ]


def phase_rows(run: Run) -> list[tuple[Stage, list[Share]]]:
    """The stages that have run, with their phases."""
    rows = [(stage, shares(phase_seconds(stage))) for stage in run.stages]
    return [(stage, found) for stage, found in rows if found]


def phases_of_run(run: Run) -> list[Share]:
    """The phases of all stages together."""
    whole: dict[str, float] = {}
    for stage in run.stages:
        for name, seconds in phase_seconds(stage).items():
            whole[name] = whole.get(name, 0.0) + seconds
    return shares(whole)
