"""Chooses from a grid of parameters so few cases that every two values still meet."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Cases with a value of each axis, in which each two values of different axes meet.

    Faults of one value or of two together show as in the whole product; those of three may not.
    The choice is greedy: at each turn the case in which most of the missing pairs meet.
    """
    product = list(itertools.product(*(range(len(axis)) for axis in axes)))

    def pairs(case: tuple[int, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(case), 2))

    missing: set[Any] = set().union(*map(pairs, product))
    chosen = []
    while missing:
        best = max(product, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return [tuple(axis[i] for axis, i in zip(axes, case, strict=True)) for case in sorted(chosen)]
