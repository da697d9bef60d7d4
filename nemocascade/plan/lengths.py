"""Distributions of response lengths: assumed, or those of a run."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nemocascade.plan.errors import PlanError
from nemocascade.runtime.jsonl import read_undamaged

DEFAULT_SHARE, DEFAULT_SPREAD = 1 / 6, 1.0
"""Assumed: the median response has a sixth of the limit's tokens, and the logarithm of lengths a
deviation of 1."""
_SAMPLES = 2048


@dataclass(frozen=True)
class Lengths:
    """Response lengths in tokens, at least 1 and at most `limit`.

    points: lengths at equally spaced probabilities from 0 to 1, linear between them; empty: they
    are log-normal, with this median and this deviation of the logarithm.
    """

    limit: int
    median: float = 0.0
    spread: float = 0.0
    points: tuple[float, ...] = ()

    def at(self, probability: ArrayLike) -> NDArray[np.float64]:
        """Lengths that a response exceeds with a probability of one minus the given one, [n]."""
        p = np.atleast_1d(np.asarray(probability, np.float64))
        if self.points:
            found = np.interp(p, np.linspace(0, 1, len(self.points)), self.points)
        else:
            normal = NormalDist()
            z = [normal.inv_cdf(min(max(each, 1e-9), 1 - 1e-9)) for each in p]
            found = self.median * np.exp(self.spread * np.array(z))
        return np.clip(np.floor(found), 1, self.limit)

    def evenly(self, count: int) -> list[int]:
        """`count` lengths at the middles of equal parts of the probability, the shortest first."""
        return [int(n) for n in self.at((np.arange(count) + 0.5) / count)]

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """`count` random lengths."""
        return [int(n) for n in self.at(rng.random(count))]

    @functools.cached_property
    def mean(self) -> float:
        """Mean length."""
        return float(np.mean(self._samples))

    def token_mean(self, prompt: float = 0.0) -> float:
        """Mean length of the sequence, with its prompt, that a random token belongs to: what the
        cost of attention follows."""
        whole = self._samples + prompt
        return float((whole**2).sum() / whole.sum())

    @functools.cached_property
    def _samples(self) -> NDArray[np.float64]:
        return np.array(self.evenly(_SAMPLES), np.float64)

    def describe(self) -> str:
        """The distribution in words."""
        if self.points:
            return f"as in the run, mean {self.mean:,.0f}, limit {self.limit:,}"
        return (
            f"log-normal, median {self.median:,.0f}, deviation {self.spread:g}, "
            f"limit {self.limit:,}: mean {self.mean:,.0f}"
        )


def assumed_lengths(limit: int) -> Lengths:
    """The assumption about responses of at most `limit` tokens."""
    return Lengths(limit, limit * DEFAULT_SHARE, DEFAULT_SPREAD)


def find_lengths(text: str, limit: int) -> Lengths:
    """Lengths of `lognormal:MEDIAN:DEVIATION`, or of a run's metrics.jsonl; empty: assumed ones.

    Raises PlanError for anything else.
    """
    if not text:
        return assumed_lengths(limit)
    kind, *numbers = text.split(":")
    if kind == "lognormal":
        try:
            median, spread = map(float, numbers)
        except ValueError:
            median = spread = -1.0
        if not (1 <= median < 1e9 and 0 <= spread <= 10):
            raise PlanError(
                f"--response-lengths {text}: give lognormal:MEDIAN:DEVIATION, a median of at least "
                "1 token and a deviation of 0 to 10, such as lognormal:8000:1.0"
            )
        return Lengths(limit, median, spread)
    rows = [row for row in run_rows(text) if row.get("response_tokens_deciles")]
    if not rows:
        raise PlanError(
            f"{text} has no response_tokens_deciles: name the metrics.jsonl of an RL or MOPD stage"
        )
    return lengths_of_rows(rows, limit)


def lengths_of_rows(rows: list[dict[str, Any]], limit: int) -> Lengths:
    """Lengths of the steps of a run, each with `response_tokens_deciles`."""
    deciles = np.mean([row["response_tokens_deciles"] for row in rows], axis=0)
    return Lengths(limit, points=tuple(map(float, deciles)))


def run_rows(path: str) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl. Raises PlanError if there is none."""
    if not Path(path).is_file():
        raise PlanError(
            f"{path} is not a file: name a metrics.jsonl, or lognormal:MEDIAN:DEVIATION for lengths"
        )
    return [row for _, row in read_undamaged(Path(path), lambda line: None)]
