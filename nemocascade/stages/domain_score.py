"""A domain's held-out score: avg@k with its standard errors, and pass@k."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PASSED = 1.0
"""A sample with at least this reward has solved its task."""


@dataclass(frozen=True)
class DomainScore:
    """Score of one domain.

    score: avg@k, the mean over the tasks of the mean reward of their samples; None if every
        verifier failed. With one sample it is the mean reward.
    tasks: number of answered tasks. errors: number of failed verdicts, which are excluded.
    samples: k, the number of samples of each task.
    standard_error: of `score` as an estimate for all tasks of this kind, from the spread of the
        tasks' means; None below two tasks.
    sampling_error: of `score` as an estimate for exactly these tasks, from the spread of each
        task's samples; None unless each has at least two.
    pass_at: pass@n by n as text, for powers of two up to k, and k: the probability that at least
        one of n samples solves its task. Unbiased; tasks with fewer than n verdicts are excluded.
    task_means: mean reward of each task's samples, in the order of the tasks, so that two artifacts
        can be compared task by task; None for a task without a verdict.
    """

    score: float | None
    tasks: int
    errors: int
    samples: int = 1
    standard_error: float | None = None
    sampling_error: float | None = None
    pass_at: Mapping[str, float] = field(default_factory=dict)
    task_means: list[float | None] = field(default_factory=list)

    @property
    def passes(self) -> str:
        """avg@k and pass@n for n > 1, as text; empty for one sample."""
        if self.samples <= 1:
            return ""
        found = [f"pass@{n} {p:.3f}" for n, p in self.pass_at.items() if n != "1"]
        return ", ".join([f"avg@{self.samples}", *found])

    def __str__(self) -> str:
        """The score; of several samples with its standard error and pass@n."""
        if self.score is None:
            return "-"
        if self.samples <= 1:
            return f"{self.score:.3f}"
        error = "" if self.standard_error is None else f" ± {self.standard_error:.3f}"
        return f"{self.score:.3f}{error} ({self.passes})"


def domain_score(rewards: Sequence[Sequence[float | None]]) -> DomainScore:
    """The score of a domain. rewards: of each task's samples, None for a failed verdict; every task
    has the same number of samples."""
    valid = [[r for r in task if r is not None] for task in rewards]
    judged = [task for task in valid if task]
    samples = max(map(len, rewards), default=1)
    by_task = [sum(task) / len(task) if task else None for task in valid]
    means = [mean for mean in by_task if mean is not None]
    return DomainScore(
        score=sum(means) / len(means) if means else None,
        tasks=len(rewards),
        errors=sum(map(len, rewards)) - sum(map(len, valid)),
        samples=samples,
        standard_error=math.sqrt(_variance(means) / len(means)) if len(means) > 1 else None,
        sampling_error=_sampling_error(judged),
        pass_at={str(n): p for n in _sizes(samples) if (p := _mean_pass(judged, n)) is not None},
        task_means=by_task,
    )


def pass_at(samples: int, solved: int, n: int) -> float:
    """Unbiased estimate of pass@n from `samples` samples of which `solved` solve the task:
    1 - C(samples - solved, n) / C(samples, n) (Chen et al., arXiv 2107.03374, Eq. 1)."""
    return 1 - math.comb(samples - solved, n) / math.comb(samples, n)


def _mean_pass(tasks: Sequence[Sequence[float]], n: int) -> float | None:
    found = [pass_at(len(t), sum(r >= PASSED for r in t), n) for t in tasks if len(t) >= n]
    return math.fsum(found) / len(found) if found else None


def _sizes(samples: int) -> list[int]:
    """The powers of two up to `samples`, and `samples`."""
    return sorted({*(1 << i for i in range(samples.bit_length())), samples})


def _sampling_error(tasks: Sequence[Sequence[float]]) -> float | None:
    if not tasks or min(map(len, tasks)) < 2:
        return None
    return math.sqrt(math.fsum(_variance(t) / len(t) for t in tasks)) / len(tasks)


def _variance(values: Sequence[float]) -> float:
    """Unbiased variance of at least two values."""
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
