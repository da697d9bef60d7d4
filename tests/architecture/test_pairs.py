"""Reduced grids of parameters lose no pair of values."""

from __future__ import annotations

import itertools

import pytest
from helpers.pairs import pairwise


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2), (4, 3, 2), (3, 3, 2, 2), (5, 4, 2, 2)])
def test_each_two_values_meet(sizes: tuple[int, ...]) -> None:
    axes = [[f"{name}{i}" for i in range(size)] for name, size in zip("abcd", sizes, strict=False)]
    cases = pairwise(*axes)
    assert len(cases) == len(set(cases))
    assert all(value in axis for case in cases for value, axis in zip(case, axes, strict=True))
    for (i, first), (j, second) in itertools.combinations(enumerate(axes), 2):
        assert {(case[i], case[j]) for case in cases} == set(itertools.product(first, second))


def test_there_are_fewer_cases_than_in_the_product() -> None:
    assert len(pairwise(range(4), range(3), range(2))) == 12
    assert len(pairwise(range(5), range(4), range(2), range(2))) == 20
