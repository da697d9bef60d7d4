"""Advice on the order of a cascade's RL stages, from the matrix of `nemocascade interference`.

The model of the score of domain d after the stages s1, s2, ... is additive, with recovery:

    score(d) = start(d) + sum_i alone(si, d) + sum_(i < j) recovery(si, sj, d)
    recovery(a, b, d) = effect of b after a - effect of b alone

The order matters through the recoveries only, so without pairs nothing is said about it. What three
stages do beyond what their pairs do is taken as zero. An order's value is the weighted mean of its
scores over the domains. Two orders differ if their distance exceeds what noise gives to the best of
all orders in 95 of 100 bootstrap draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemocascade.cascade.effects import LEVEL, Effect, Effects, Floats, read_interference
from nemocascade.cascade.order_model import OrderModel
from nemocascade.cascade.order_mopd import MopdAdvice, advise_mopd
from nemocascade.recipe import RecipeError
from nemocascade.recipe.commands import OrderSettings

MOST_STAGES = 8
"""Most stages whose orders are all compared: 8! = 40,320."""
LISTED = 5
"""Orders that the advice lists."""
_SMALL = 1e-9
"""Distances that are rounding."""


@dataclass(frozen=True)
class RankedOrder:
    """One order.

    value: predicted weighted mean reward after all stages. behind: distance of its value from the
    best order's. share: fraction of bootstrap draws in which it is the best. differs: its distance
    is beyond noise. scores: predicted, by domain.
    """

    stages: tuple[str, ...]
    value: float
    behind: Effect
    share: float
    differs: bool
    scores: dict[str, float]


@dataclass(frozen=True)
class Precedence:
    """The gain in an order's value if `first` runs before `second`, instead of after it."""

    first: str
    second: str
    gain: Effect


@dataclass(frozen=True)
class Fit:
    """How well additive effects alone predict the pairs.

    explained: fraction of the pairs' squared changes. misfit: mean squared error of the prediction
    in units of its noise; 1 = noise alone.
    """

    explained: float
    misfit: float


@dataclass(frozen=True)
class OrderAdvice:
    """Orders that the data support.

    domains: their weights. other_scales: domains whose rewards are not in 0..1.
    orders: the best ones, best first; empty without pairs. own: the recipe's order. tied, total:
    number of orders that do not differ from the best, and of all. distance: pairs of stages that
    the recipe has in another order than the best, and than the nearest order that is tied with it.
    precedences: pairs whose order matters beyond noise. proposed: the best order, or the recipe's
    own if it does not differ from it; empty if nothing can be said.
    """

    domains: dict[str, float]
    other_scales: tuple[str, ...]
    orders: tuple[RankedOrder, ...]
    own: RankedOrder | None
    tied: int
    total: int
    distance: tuple[int, int]
    precedences: tuple[Precedence, ...]
    proposed: tuple[str, ...]
    fit: Fit | None
    mopd: MopdAdvice

    @property
    def is_decided(self) -> bool:
        """True if at least one order is worse than the best beyond noise."""
        return self.tied < self.total

    def as_json(self) -> dict[str, Any]:
        """The advice as JSON values."""
        return asdict(self) | {"is_decided": self.is_decided}


def advise(settings: OrderSettings) -> OrderAdvice:
    """Advice for a run folder. Raises ReportError without a matrix, RecipeError for invalid
    settings."""
    effects = Effects(read_interference(Path(settings.run)))
    return advise_order(effects, settings.weights, settings.draws, Path(settings.run))


def advise_order(
    effects: Effects,
    weights: Mapping[str, float] | None = None,
    draws: int = 1000,
    run_dir: Path | None = None,
) -> OrderAdvice:
    """Advice for measured effects. run_dir: run whose own MOPD stage is looked at.

    Raises RecipeError for unknown domains, weights without a positive one, and too many stages.
    """
    stages = effects.stages
    if len(stages) > MOST_STAGES:
        raise RecipeError(
            [
                f"{len(stages)} stages have too many orders to compare: measure at most "
                f"{MOST_STAGES} with `nemocascade interference --stages ...`"
            ]
        )
    model = OrderModel(effects, _weights(effects, weights or {}), draws)
    named = dict(zip(effects.domains, model.weights.tolist(), strict=True))
    others = tuple(d for i, d in enumerate(effects.domains) if not effects.in_points(i))
    own = tuple(range(len(stages)))
    total = len(model.orders)
    if not effects.has_pairs:
        mopd = advise_mopd(effects, model, own, run_dir)
        return OrderAdvice(named, others, (), None, total, total, (0, 0), (), (), None, mopd)
    ranking = _Ranking(model, own)
    tied = np.flatnonzero(~ranking.differs)
    chosen = own if not ranking.differs[model.orders.index(own)] else ranking.best
    decided = len(tied) < total
    return OrderAdvice(
        domains=named,
        other_scales=others,
        orders=tuple(ranking.entry(i) for i in ranking.sorted[:LISTED]),
        own=ranking.entry(model.orders.index(own)),
        tied=len(tied),
        total=total,
        distance=(
            swaps(own, ranking.best),
            min(swaps(own, model.orders[i]) for i in tied),
        ),
        precedences=_precedences(model),
        proposed=tuple(stages[s] for s in chosen) if decided else (),
        fit=_fit(effects),
        mopd=advise_mopd(effects, model, chosen if decided else own, run_dir),
    )


def swaps[T](first: Sequence[T], second: Sequence[T]) -> int:
    """Kendall's distance of two orders: pairs that are in another order."""
    place = {stage: number for number, stage in enumerate(second)}
    return sum(place[a] > place[b] for a, b in itertools.combinations(first, 2))


class _Ranking:
    """All orders by value, with their distances from the best one.

    The critical distance, in standard errors, is the 95 % quantile of the largest distance from the
    best order of a draw in which all orders are equal. So it allows for having chosen the best.
    """

    def __init__(self, model: OrderModel, own: tuple[int, ...]) -> None:
        self.model = model
        mean, noise = model.recovery, model.recovery_draws - model.recovery
        self.values = model.start_value + model.before @ mean
        # Equal values: the order nearest to the recipe's is the better one.
        best = np.flatnonzero(self.values >= self.values.max() - _SMALL)
        top = min(best, key=lambda i: (swaps(own, model.orders[i]), model.orders[i]))
        self.top, self.best = int(top), model.orders[top]
        # [orders, pairs]: distances in this space are standard errors of differences of orders.
        size, axes = np.linalg.eigh(np.atleast_2d(np.cov(noise.T)))
        self._spread = model.before @ (axes * np.sqrt(np.maximum(size, 0)))
        draws = (model.before @ noise.T).astype(np.float32)
        highest = (draws + self.values[:, None].astype(np.float32)).argmax(0)
        self.shares = np.bincount(highest, minlength=len(self.values)) / draws.shape[1]
        worst = [self._largest(draws[:, k]) for k in range(draws.shape[1])]
        limit = np.quantile(worst, 1 - LEVEL)
        self.behind = self.values[self.top] - self.values
        self.errors = self._errors(self.top)
        self.differs = (self.behind > limit * self.errors) & (self.behind > _SMALL)
        self.sorted = sorted(
            range(len(self.values)),
            key=lambda i: (-round(self.values[i], 9), swaps(own, model.orders[i]), model.orders[i]),
        )

    def entry(self, number: int) -> RankedOrder:
        effects, order = self.model.effects, self.model.orders[number]
        behind = Effect(
            float(self.behind[number]),
            float(self.errors[number]),
            significant=bool(self.differs[number]),
        )
        scores = self.model.scores_after(order)
        return RankedOrder(
            tuple(effects.stages[s] for s in order),
            float(self.values[number]),
            behind,
            float(self.shares[number]),
            bool(self.differs[number]),
            dict(zip(effects.domains, scores.tolist(), strict=True)),
        )

    def _errors(self, number: int) -> Floats:
        """[orders] standard errors of the distances from one order."""
        lengths = (self._spread**2).sum(1)
        squares = lengths + lengths[number] - 2 * self._spread @ self._spread[number]
        found: Floats = np.sqrt(np.maximum(squares, 0))
        return found

    def _largest(self, draw: NDArray[np.float32]) -> float:
        """Largest distance of an order from the best one of a draw, in standard errors."""
        top = int(draw.argmax())
        errors = self._errors(top)
        known = errors > _SMALL
        return float(((draw[top] - draw)[known] / errors[known]).max(initial=0.0))


def _weights(effects: Effects, named: Mapping[str, float]) -> Floats:
    """[domains] weights that sum to 1."""
    found = [f"--weights names {d}, which is not scored" for d in named if d not in effects.domains]
    found += [
        f"--weights {d} {w} must be finite and at least 0"
        for d, w in named.items()
        if not 0 <= w < math.inf
    ]
    if named and not found and not sum(named.values()) > 0:
        found.append("--weights are all 0: give one domain a positive weight")
    if found:
        raise RecipeError(found)
    weights = np.array([named.get(d, 0.0) if named else 1.0 for d in effects.domains])
    return np.asarray(weights / weights.sum())


def _precedences(model: OrderModel) -> tuple[Precedence, ...]:
    """Pairs of stages whose order matters, by simultaneous 95 % intervals; largest gain first."""
    stages = model.effects.stages
    pairs = list(itertools.combinations(range(len(stages)), 2))
    columns = [(a * len(stages) + b, b * len(stages) + a) for a, b in pairs]
    gains = np.array([model.recovery[i] - model.recovery[j] for i, j in columns])
    draws = np.stack([model.recovery_draws[:, i] - model.recovery_draws[:, j] for i, j in columns])
    errors = draws.std(1)
    noise = np.abs(draws - gains[:, None]) / np.maximum(errors, _SMALL)[:, None]
    limit = np.quantile(noise.max(0), 1 - LEVEL)
    found = []
    for (a, b), gain, error in zip(pairs, gains.tolist(), errors.tolist(), strict=True):
        if abs(gain) > max(limit * error, _SMALL):
            first, second = (a, b) if gain > 0 else (b, a)
            effect = Effect(abs(gain), error, significant=True)
            found.append(Precedence(stages[first], stages[second], effect))
    return tuple(sorted(found, key=lambda p: -p.gain.change))


def _fit(effects: Effects) -> Fit:
    """The fit of additive effects to the pairs, over all domains."""
    missed, changes, errors = [], [], []
    for a, b in itertools.permutations(effects.stages, 2):
        signs = np.zeros(len(effects.names))
        for name, sign in (((a, b), 1), ((a,), -1), ((b,), -1), ((), 1)):
            signs[effects.index[name]] += sign
        recovery = effects.contrast(signs)
        missed += [e.change for e in recovery]
        errors += [e.standard_error for e in recovery]
        changes += [e.change for e in effects.effect((a, b))]
    total = float(np.square(changes).sum())
    left = np.square(missed)
    return Fit(
        explained=1 - float(left.sum()) / total if total else 0.0,
        misfit=float((left / np.square(errors)).mean()),
    )
