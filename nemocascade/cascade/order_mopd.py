"""Advice on MOPD: where distillation from the run's own artifacts has something to win back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from nemocascade.cascade.effects import FOLDER, LEVEL, Effect, Effects
from nemocascade.cascade.lineage import CascadeListing, listed_in
from nemocascade.cascade.order_model import OrderModel
from nemocascade.cascade.records import CASCADE, SCORES
from nemocascade.stages.scoring import read_scores


@dataclass(frozen=True)
class Taught:
    """A domain with a teacher above the student. teacher: stages of the artifact, from the start;
    empty for the start itself. gap: between their scores."""

    domain: str
    teacher: tuple[str, ...]
    gap: Effect


@dataclass(frozen=True)
class MopdPlace:
    """A place for MOPD: after the stages `after`. gain: weighted mean of the gaps, the most that
    distillation can win there."""

    after: tuple[str, ...]
    gain: Effect
    taught: tuple[Taught, ...]


@dataclass(frozen=True)
class MopdAdvice:
    """places: those with a teacher above the student beyond noise, largest gain first; empty if
    MOPD has nothing to win. own: RL stages before the run's own MOPD, None without one. recovered:
    fraction of the gaps to its teachers that it closed; None if it was not scored."""

    places: tuple[MopdPlace, ...]
    own: int | None
    recovered: float | None

    @property
    def tied(self) -> int:
        """Number of places whose gain does not differ from the best one's by two errors."""
        best = self.places[0].gain if self.places else Effect(0.0, 0.0)
        return sum(
            best.change - p.gain.change <= 2 * max(best.standard_error, p.gain.standard_error)
            for p in self.places
        )


def advise_mopd(
    effects: Effects, model: OrderModel, order: Sequence[int], run_dir: Path | None
) -> MopdAdvice:
    """Places in an order where a measured artifact scores above the predicted student.

    A gap counts if it is beyond noise among all places, domains and candidates together
    (Bonferroni), since each teacher is the best of its candidates.
    """
    cuts = range(1, len(order) + 1)
    tests = len(cuts) * len(effects.domains) * len(effects.names)
    limit = NormalDist().inv_cdf(1 - LEVEL / tests)
    measured, drawn = model.scores[0], model.score_draws
    best = measured.argmax(0)
    places = []
    for cut in cuts:
        student = model.prefix(model.scores, order[:cut])[0]
        students = model.prefix(drawn, order[:cut])
        taught, weighted = [], np.zeros(len(drawn))
        total = 0.0
        for column, domain in enumerate(effects.domains):
            row = best[column]
            gap = float(measured[row, column] - student[column])
            gaps = drawn[:, row, column] - students[:, column]
            error = float(gaps.std())
            if gap > limit * error and gap > 0:
                effect = Effect(gap, error, significant=True)
                taught.append(Taught(domain, effects.names[row], effect))
                total += gap * float(model.weights[column])
                weighted += gaps * model.weights[column]
        if taught:
            after = tuple(effects.stages[s] for s in order[:cut])
            places.append(
                MopdPlace(after, Effect(total, float(weighted.std()), True), tuple(taught))
            )
    own, recovered = _own_mopd(run_dir) if run_dir is not None else (None, None)
    return MopdAdvice(tuple(sorted(places, key=lambda p: -p.gain.change)), own, recovered)


def _own_mopd(run_dir: Path) -> tuple[int | None, float | None]:
    """RL stages before a run's first MOPD stage, and the share of the gaps that it closed."""
    folder = run_dir.parent if run_dir.name == FOLDER else run_dir
    if not (folder / CASCADE).is_file():
        return None, None
    run = listed_in(folder)
    main = [s for s in run.stages if not s.side]
    number = next((i for i, s in enumerate(main) if s.kind == "mopd"), None)
    if number is None:
        return None, None
    own = sum(s.kind == "grpo" for s in main[:number])
    return own, _recovered(folder, run, main[number].name, main[number].start)


def _recovered(folder: Path, run: CascadeListing, name: str, start: str) -> float | None:
    before, after = (read_scores(folder / "stages" / s / SCORES) for s in (start, name))
    if before is None or after is None or before.settings != after.settings:
        return None
    closed = gaps = 0.0
    for domain, teacher in run.teachers.items():
        a, b = before.of(domain), after.of(domain)
        if teacher.score is not None and a is not None and b is not None and teacher.score > a:
            closed, gaps = closed + b - a, gaps + teacher.score - a
    return closed / gaps if gaps else None
