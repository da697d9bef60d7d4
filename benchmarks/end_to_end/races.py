"""Statistics of races between ways to train: steps and tokens to a level, with intervals.

A race is one run of one way. It records held-out scores at some steps, from the same student and on
the same prompts as its rivals. Intervals are 95 % percentile bootstraps over seeds (Efron). Races
of one seed are resampled together, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from nemocascade.cascade.report import figures

DRAWS = 10_000


@dataclass(frozen=True)
class Race:
    """One run. steps, scores, tokens, seconds: at each evaluation, the first before any step;
    generated tokens and training seconds are cumulative. teacher: the level to reach."""

    steps: Sequence[int]
    scores: Sequence[float]
    tokens: Sequence[float]
    seconds: Sequence[float]
    teacher: float

    def first_at(self, level: float) -> int | None:
        """Number of the first evaluation whose score is at least `level`."""
        return next((n for n, score in enumerate(self.scores) if score >= level), None)

    def to_level(self, amounts: Sequence[float], level: float) -> float:
        """Amount spent up to `level`; infinite if it was not reached."""
        found = self.first_at(level)
        return float("inf") if found is None else float(amounts[found])

    def recovered(self) -> np.ndarray:
        """[evaluations] fraction of the lost score that is recovered: 0 student, 1 teacher; 0 if
        nothing was lost."""
        lost = self.teacher - self.scores[0]
        return (np.array(self.scores) - self.scores[0]) / (lost or np.inf)


def interval(
    values: Sequence[Any], statistic: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, float, float]:
    """A statistic of values by seed, and its 95 % bootstrap interval. statistic: reduces the last
    axis."""
    found = np.array(values, dtype=float)
    draws = np.random.default_rng(0).integers(0, len(found), (DRAWS, len(found)))
    spread = statistic(found[draws])
    # Order statistics, since infinite values have no mean to interpolate.
    low, high = np.quantile(spread, (0.025, 0.975), method="inverted_cdf")
    return float(statistic(found)), float(low), float(high)


def summary(races: Mapping[str, Sequence[Race]], margin: float) -> dict[str, Any]:
    """Summary by way, then the paired differences of the first way from each other one.

    By way: number of seeds that reached the teacher's score less `margin`, median steps, tokens and
    seconds until then, final scores relative to the teacher, and the mean fraction recovered. JSON
    values; null means "not reached".
    """
    found: dict[str, Any] = {}
    for name, runs in races.items():
        entry: dict[str, Any] = {
            "seeds": len(runs),
            "reached": sum(r.first_at(r.teacher - margin) is not None for r in runs),
        }
        for what in ("steps", "tokens", "seconds"):
            spent = [r.to_level(getattr(r, what), r.teacher - margin) for r in runs]
            entry[f"{what}_to_teacher"] = _entry(interval(spent, _median))
        entry["final_minus_teacher"] = _entry(
            interval([r.scores[-1] - r.teacher for r in runs], _mean)
        )
        shares = [float(r.recovered().mean()) for r in runs]
        entry["mean_recovered"] = _entry(interval(shares, _mean))
        found[name] = entry
    first, *others = races
    for other in others:
        pairs = list(zip(races[first], races[other], strict=True))
        found[f"{first} - {other}"] = {
            "final_score": _entry(interval([a.scores[-1] - b.scores[-1] for a, b in pairs], _mean)),
            "mean_recovered": _entry(
                interval([float((a.recovered() - b.recovered()).mean()) for a, b in pairs], _mean)
            ),
        }
    return found


def _median(values: np.ndarray) -> np.ndarray:
    """Upper median, so that a value that was not reached remains infinite."""
    return np.sort(values, -1)[..., values.shape[-1] // 2]


def _mean(values: np.ndarray) -> np.ndarray:
    return values.mean(-1)


def _entry(found: tuple[float, float, float]) -> dict[str, Any]:
    value, low, high = (None if np.isinf(x) else x for x in found)
    return {"value": value, "ci95": [low, high]}


def plot(path: Path, races: Mapping[str, Sequence[Race]], title: str) -> None:
    """Plot the fraction recovered over steps and over generated tokens: seeds thin, their mean bold
    with its interval."""
    with matplotlib.rc_context(figures.SETTINGS):
        figure = Figure(figsize=(9.0, 3.6), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        axes = figure.subplots(1, 2, sharey=True)
        for ax, what in zip(axes, ("steps", "tokens"), strict=True):
            for style, (name, runs) in enumerate(races.items()):
                color, _ = figures.style_of(style)
                shares = np.stack([100 * r.recovered() for r in runs])
                amounts = np.stack([getattr(r, what) for r in runs]).mean(0)
                for run, share in zip(runs, shares, strict=True):
                    ax.plot(getattr(run, what), share, color=color, alpha=0.3, lw=0.8)
                if len(runs) > 1:
                    bands = np.array([interval(column, _mean)[1:] for column in shares.T])
                    ax.fill_between(amounts, *bands.T, color=color, alpha=0.15, lw=0)
                ax.plot(amounts, shares.mean(0), color=color, lw=2, label=name)
            ax.axhline(100, color=figures.MUTED, ls=":", lw=1.1)
            ax.text(0, 100, "teacher", color=figures.MUTED, va="bottom", fontsize=8)
            figures.finish_axes(ax)
            ax.set_xlabel("steps" if what == "steps" else "generated tokens")
        axes[0].set_ylabel("recovered, % (0 = the regressed student)")
        axes[0].legend(frameon=False, loc="lower right")
        figures.png(path, figure)
