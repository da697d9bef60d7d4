"""Chooses few cases for the quick tests: of a grid of parameters, and of runs of two sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

SMALL, WHOLE = "small", "whole"
"""Sizes of a run that many tests look at."""


def by_size(small: Iterable[str], whole: Iterable[str]) -> pytest.MarkDecorator:
    """A test of a `name` at a `size`: quick ones of the small run, slow ones of the whole run."""
    return pytest.mark.parametrize(
        ("name", "size"),
        [
            *(pytest.param(name, SMALL) for name in small),
            *(pytest.param(name, WHOLE, marks=pytest.mark.slow) for name in whole),
        ],
    )


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
