"""Scores of all orders of the stages: additive effects, with recoveries from the pairs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from nemocascade.cascade.effects import Effects, Floats


class OrderModel:
    """Predicted scores, see `nemocascade.cascade.order`, and bootstrap draws of all their parts.

    Without pairs every recovery is 0.
    """

    def __init__(self, effects: Effects, weights: Floats, draws: int) -> None:
        self.effects, self.weights = effects, weights
        count = len(effects.stages)
        self.orders = list(itertools.permutations(range(count)))
        self.before = np.zeros((len(self.orders), count * count))
        """[orders, stages * stages]: 1 where the first stage runs before the second."""
        table = np.array(self.orders)
        for i, j in itertools.combinations(range(count), 2):
            self.before[np.arange(len(table)), table[:, i] * count + table[:, j]] = 1
        self.scores = effects.scores[None]
        """[1, branches, domains] measured scores."""
        self.score_draws = effects.draws(draws)
        """[draws, branches, domains]"""
        # A stage never runs before itself.
        self.recovery = (self.recoveries(self.scores) @ weights)[0]
        """[stages * stages] weighted mean over the domains."""
        self.recovery_draws = self.recoveries(self.score_draws) @ weights
        """[draws, stages * stages]"""
        ends = self.prefix(self.scores, self.orders[0]) @ weights
        self.start_value = float(ends[0] - self.before[0] @ self.recovery)
        """Value of every order without recoveries."""

    def alone(self, scores: Floats) -> Floats:
        """[draws, stages, domains] effects of single stages. scores: [draws, branches, domains]."""
        index = self.effects.index
        rows = [index[(name,)] for name in self.effects.stages]
        return np.asarray(scores[:, rows] - scores[:, [index[()]]])

    def recoveries(self, scores: Floats) -> Floats:
        """[draws, stages * stages, domains] recoveries; 0 on the diagonal and without pairs."""
        effects, stages = self.effects, self.effects.stages
        found = np.zeros((len(scores), len(stages) ** 2, scores.shape[2]))
        if not effects.has_pairs:
            return found
        alone, start = self.alone(scores), scores[:, effects.index[()]]
        for a, b in itertools.permutations(range(len(stages)), 2):
            both = scores[:, effects.index[stages[a], stages[b]]]
            found[:, a * len(stages) + b] = both - start - alone[:, a] - alone[:, b]
        return found

    def prefix(self, scores: Floats, order: Sequence[int]) -> Floats:
        """[draws, domains] scores after the stages of `order`, which need not be all."""
        count = len(self.effects.stages)
        pairs = [a * count + b for a, b in itertools.combinations(order, 2)]
        found = scores[:, self.effects.index[()]] + self.alone(scores)[:, list(order)].sum(1)
        return np.asarray(found + self.recoveries(scores)[:, pairs].sum(1))

    def scores_after(self, order: Sequence[int]) -> Floats:
        """[domains] predicted scores after the stages of `order`."""
        return np.asarray(self.prefix(self.scores, order)[0])
