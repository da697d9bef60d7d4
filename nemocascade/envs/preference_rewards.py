"""The RLHF reward of Nemotron-Cascade 2 (arXiv 2603.19220), from comparisons.

    s_i = s_j:   s_i += 3.5 - s_r,  s_j += s_r - 3.5                     the ranking breaks a tie
    R_base(i) =  mean of i's scores
    w_i =        1 - (l_i - l_min) / (l_max - l_min), less the group's mean
    R_i =        R_base(i) + 0.5 w_think(i) + 0.5 w_answer(i) + conciseness bonuses

The shortest reasoning and the shortest answer each get a bonus of 0.5 if their R_base is at or
above the group's 80th percentile. As in NeMo-Gym, that is the base of the response at rank G / 5,
rounded down, of G responses: the third of 16, and the best of fewer than ten. One response gets
each bonus, the first of several equally short ones. Empty reasoning or answers are never the
shortest. Lengths that are all equal weigh 0.

A pair without an answer is excluded for both responses. A response without any answered pair has
no reward and is excluded from the group's lengths and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from nemocascade.judges.prompts import UNPARSED_RANKING, Comparison

LENGTH_WEIGHT = 0.5
BONUS = 0.5
TOP = 5
"""One response in this many is in the group's 80th percentile."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class PreferenceReward:
    """A reward and its parts. base: 1..5, and up to 2.5 beyond where ties were broken.

    think, answer: weighted length terms. bonus: 0, 0.5 or 1. pairs: number of answered comparisons.
    """

    base: float
    think: float
    answer: float
    bonus: float
    pairs: int

    @property
    def total(self) -> float:
        return self.base + self.think + self.answer + self.bonus


def all_pairs(count: int) -> list[Pair]:
    """Every pair of `count` responses once, the lower index first: 16 make 120."""
    return list(combinations(range(count), 2))


def break_tie(comparison: Comparison) -> tuple[float, float]:
    """Return the two scores; the ranking is added if they are equal."""
    first, second = comparison.first, comparison.second
    if first == second:
        lean = UNPARSED_RANKING - comparison.ranking
        return first + lean, second - lean
    return first, second


def group_rewards(
    comparisons: Mapping[Pair, Comparison | None],
    think_lengths: Sequence[int],
    answer_lengths: Sequence[int],
) -> list[PreferenceReward | None]:
    """Return the rewards of a prompt's responses; None for one without an answered pair.

    comparisons: by pair, None if the judge gave no answer. think_lengths, answer_lengths: length of
    each response's reasoning and final message, in any common unit.
    """
    scores: list[list[float]] = [[] for _ in think_lengths]
    for (i, j), comparison in comparisons.items():
        if comparison is not None:
            first, second = break_tie(comparison)
            scores[i].append(first)
            scores[j].append(second)
    there = [i for i, found in enumerate(scores) if found]
    base = {i: sum(scores[i]) / len(scores[i]) for i in there}
    rewards: list[PreferenceReward | None] = [None] * len(scores)
    if not there:
        return rewards
    bar = sorted(base.values(), reverse=True)[max(0, len(base) // TOP - 1)]
    think, answer = (
        dict(zip(there, length_terms([lengths[i] for i in there]), strict=True))
        for lengths in (think_lengths, answer_lengths)
    )
    bonus = dict.fromkeys(there, 0.0)
    for lengths in (think_lengths, answer_lengths):
        shortest = min((i for i in there if lengths[i] > 0), key=lengths.__getitem__, default=None)
        if shortest is not None and base[shortest] >= bar:
            bonus[shortest] += BONUS
    for i in there:
        rewards[i] = PreferenceReward(
            base=base[i],
            think=LENGTH_WEIGHT * think[i],
            answer=LENGTH_WEIGHT * answer[i],
            bonus=bonus[i],
            pairs=len(scores[i]),
        )
    return rewards


def length_terms(lengths: Sequence[int]) -> list[float]:
    """Return `w_i` of each length: the shortest is highest, the mean is 0. Equal lengths: all 0."""
    low, high = min(lengths), max(lengths)
    if low == high:
        return [0.0] * len(lengths)
    raw = [1 - (length - low) / (high - low) for length in lengths]
    mean = sum(raw) / len(raw)
    return [w - mean for w in raw]
