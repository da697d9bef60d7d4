"""Effects of RL stages on the domains: changes of held-out scores with their standard errors.

RUN/interference/interference.json holds the mean reward of every task for the start artifact and
for each branch. All branches answer the same tasks, so changes are differences task by task.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from nemocascade.cascade.errors import ReportError
from nemocascade.runtime.stored_records import record_of
from nemocascade.stages.scoring import read_versioned

VERSION = 1
FOLDER = "interference"
FILE = "interference.json"
LEVEL = 0.05
"""Probability that noise alone marks any cell of a matrix: of single stages, or of pairs."""

Floats = NDArray[np.float64]
TaskMeans = Mapping[str, Sequence[float | None]]
"""Mean reward of each task, by domain; None for a task without a verdict."""


@dataclass(frozen=True)
class Branch:
    """Scores of one branch. stages: one, or two in the order in which they ran. seed: of its
    training. tasks: see `TaskMeans`."""

    stages: list[str]
    seed: int
    tasks: dict[str, list[float | None]]


@dataclass(frozen=True)
class Interference:
    """Content of interference.json.

    start: the artifact that all branches start from. order: the stages, as the recipe orders them.
    steps, trains: steps and trained domains of each. base: task means of the start artifact.
    """

    start: str
    digest: str
    order: list[str]
    steps: dict[str, int]
    trains: dict[str, list[str]]
    base: dict[str, list[float | None]]
    branches: list[Branch]


@dataclass(frozen=True)
class Effect:
    """A change of a domain's mean reward, and its standard error. significant: beyond what noise
    gives in the whole matrix."""

    change: float
    standard_error: float
    significant: bool = False


def read_interference(run_dir: Path) -> Interference:
    """The measured branches of a cascade's run folder, or of its folder `interference`.

    Raises ReportError if there are none, or if they cannot be read.
    """
    path = run_dir / FILE
    path = path if path.is_file() else run_dir / FOLDER / FILE
    if not path.is_file():
        raise ReportError(
            f"{path} does not exist: run `nemocascade interference RECIPE`, or name the run folder "
            "of a cascade that has it"
        )
    found = read_versioned(path, VERSION)
    try:
        if found is None:
            raise ValueError(f"it is not JSON of version {VERSION}")
        # The other entries are computed from these.
        return record_of(Interference, found["measured"])
    except (ValueError, KeyError) as error:
        raise ReportError(
            f"{path} is damaged ({error}): start `nemocascade interference` again, which keeps "
            "what it has trained and scored"
        ) from None


class Effects:
    """Effects of the stages on the domains, from the task means of all branches.

    A standard error has three parts: the spread over the tasks of the difference task by task, the
    spread over training seeds, and one task's share, since equal answers to n tasks leave a rate of
    about 1/n open. The spread over seeds is one number a domain, pooled over the branches; with one
    seed it is unknown, and taken as 0.
    """

    def __init__(self, measured: Interference) -> None:
        self.measured = measured
        self.stages = [*measured.order]
        self.domains = [*measured.base]
        runs: dict[tuple[str, ...], list[Branch]] = {(): []}
        for branch in measured.branches:
            runs.setdefault(tuple(branch.stages), []).append(branch)
        self.names = list(runs)
        """Sequences of stages with scores; the empty one is the start."""
        self.index = {name: number for number, name in enumerate(self.names)}
        self.seeds = max(1, min((len(r) for n, r in runs.items() if n), default=1))
        self.tasks = [self._tasks(domain, runs) for domain in self.domains]
        """By domain: [branches, tasks] mean rewards, averaged over seeds."""
        self.seed_error = np.array([self._seed_error(d, runs) for d in self.domains])
        """[domains] standard error of a branch's score from its training seeds."""

    @property
    def has_pairs(self) -> bool:
        """True if there are pairs of stages, and each ran in both orders."""
        pairs = list(itertools.permutations(self.stages, 2))
        return bool(pairs) and all(pair in self.index for pair in pairs)

    @cached_property
    def scores(self) -> Floats:
        """[branches, domains] mean rewards."""
        return np.stack([tasks.mean(1) for tasks in self.tasks], 1)

    def in_points(self, column: int) -> bool:
        """True if all rewards of a domain are in 0..1; they are then shown times 100."""
        tasks = self.tasks[column]
        return bool((tasks >= 0).all() and (tasks <= 1).all())

    def effect(self, after: Sequence[str], before: Sequence[str] = ()) -> list[Effect]:
        """Change of each domain from branch `before` to branch `after`."""
        signs = np.zeros(len(self.names))
        signs[self.index[tuple(after)]] += 1
        signs[self.index[tuple(before)]] -= 1
        return self.contrast(signs)

    def contrast(self, signs: Floats) -> list[Effect]:
        """Weighted sum of the branches' scores in each domain. signs: [branches]."""
        trained = np.array([bool(name) for name in self.names])
        scale = float(np.sum(signs[trained] ** 2))
        found = []
        for tasks, seed_error in zip(self.tasks, self.seed_error, strict=True):
            values = signs @ tasks
            count = len(values)
            variance = values.var(ddof=1) / count if count > 1 else math.inf
            variance += (seed_error**2 + 1 / count**2) * scale
            found.append(Effect(float(values.mean()), math.sqrt(variance)))
        return found

    @cached_property
    def alone(self) -> dict[str, list[Effect]]:
        """Effect of each stage alone on each domain, with significant ones marked."""
        return _marked(
            {name: self.effect((name,)) for name in self.stages if (name,) in self.index}
        )

    @cached_property
    def second(self) -> dict[tuple[str, str], list[Effect]]:
        """By (first, second): effect of the second stage, after the first, on each domain."""
        pairs = [name for name in self.names if len(name) == 2]
        return _marked({(a, b): self.effect((a, b), (a,)) for a, b in pairs})

    def draws(self, number: int, seed: int = 0) -> Floats:
        """[number, branches, domains] bootstrap draws of the scores: resampled tasks, and normal
        noise with the other parts of the standard error. The draws of a branch do not depend on
        where it is listed."""
        found = np.empty((number, len(self.names), len(self.domains)))
        for column, (tasks, seed_error) in enumerate(zip(self.tasks, self.seed_error, strict=True)):
            rows = [row.tobytes() for row in tasks]
            # Domains with the same answers, such as none solved, have noise of their own.
            name = self.domains[column].encode()
            dice = np.random.default_rng([seed, zlib.crc32(b"".join([name, *sorted(rows)]))])
            count = tasks.shape[1]
            weights = dice.multinomial(count, np.full(count, 1 / count), number) / count
            noise = np.empty((number, len(rows)))
            noise[:, sorted(range(len(rows)), key=rows.__getitem__)] = dice.normal(
                0, math.hypot(seed_error, 1 / count), noise.shape
            )
            noise[:, self.index[()]] = 0
            found[:, :, column] = weights @ tasks.T + noise
        return found

    def _tasks(self, domain: str, runs: Mapping[tuple[str, ...], Sequence[Branch]]) -> Floats:
        """[branches, tasks] of those tasks that have a verdict in every branch."""
        base = _numbers(self.measured.base[domain])
        rows = [base]
        for name, branches in runs.items():
            if name:
                rows.append(np.mean([_numbers(b.tasks[domain]) for b in branches], 0))
        found = np.stack(rows)
        kept = found[:, np.isfinite(found).all(0)]
        if not kept.shape[1]:
            raise ReportError(
                f"{domain} has no task with a verdict in every branch: leave it out of "
                "scores.domains, or see its errors in the branches' scores.json"
            )
        return kept

    def _seed_error(self, domain: str, runs: Mapping[tuple[str, ...], Sequence[Branch]]) -> float:
        """From pairs of seeds: the variance of their scores' difference, less that of its tasks."""
        found = []
        for name, branches in runs.items():
            scores = [_numbers(b.tasks[domain]) for b in branches] if name else []
            for first, second in itertools.combinations(scores, 2):
                gap = (first - second)[np.isfinite(first - second)]
                if len(gap) > 1:
                    found.append((gap.mean() ** 2 - gap.var(ddof=1) / len(gap)) / 2)
        return math.sqrt(max(0.0, float(np.mean(found))) / self.seeds) if found else 0.0


def _numbers(values: Sequence[float | None]) -> Floats:
    return np.array([math.nan if v is None else v for v in values])


def _marked[K](effects: Mapping[K, Sequence[Effect]]) -> dict[K, list[Effect]]:
    """Effects with the significant ones marked, by Holm's method over all of them."""
    order = sorted(
        ((_p_value(e), key, i) for key, found in effects.items() for i, e in enumerate(found)),
        key=lambda entry: entry[0],
    )
    marked = set()
    for rank, (p, key, i) in enumerate(order):
        if p > LEVEL / (len(order) - rank):
            break
        marked.add((key, i))
    return {
        key: [
            Effect(e.change, e.standard_error, significant=(key, i) in marked)
            for i, e in enumerate(found)
        ]
        for key, found in effects.items()
    }


def _p_value(effect: Effect) -> float:
    """Two-sided, for a change of zero."""
    if not effect.standard_error or math.isinf(effect.standard_error):
        return 1.0
    return 2 * NormalDist().cdf(-abs(effect.change) / effect.standard_error)
