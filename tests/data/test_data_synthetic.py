"""Synthetic rows: correct, varied, reproducible, and disjoint between training and held-out."""

from __future__ import annotations

import itertools
import re

import pytest

from nemocascade.data.formats import parse_row
from nemocascade.data.synthetic import synthetic_rows
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime.row_errors import DataError

NAME = "synthetic:arithmetic"
SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}


def _problems(seed: int, rows: int, *, heldout: bool) -> list[str]:
    made = synthetic_rows(NAME, seed=seed, rows=rows, heldout=heldout)
    return [row["messages"][0]["content"] for row in made]


def test_rows_follow_the_seed() -> None:
    assert _problems(1, 50, heldout=False) == _problems(1, 80, heldout=False)[:50]
    assert _problems(1, 50, heldout=False) != _problems(2, 50, heldout=False)


def test_problems_are_different_and_heldout_ones_are_never_trained_on() -> None:
    trained = [p for seed in (1, 2) for p in _problems(seed, 4000, heldout=False)]
    heldout = [p for seed in (1, 2, 3) for p in _problems(seed, 300, heldout=True)]
    assert len(set(trained[:4000])) == 4000
    assert len(set(heldout[:300])) == 300
    assert not set(trained) & set(heldout)


def test_every_step_is_right_and_leads_to_the_boxed_answer() -> None:
    seen = set()
    for row in synthetic_rows(NAME, seed=5, rows=500):
        problem, reply = row["messages"]
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", reply["reasoning_content"])
        assert len(steps) in (2, 3)
        for a, sign, b, c in steps:
            assert SIGNS[sign](int(a), int(b)) == int(c) > 0
            assert sign != "/" or int(a) % int(b) == 0
            seen.add(sign)
        for before, after in itertools.pairwise(steps):
            assert before[3] == after[0]
        assert reply["content"].endswith(rf"\boxed{{{steps[-1][3]}}}")
        # The problem states the first quantity and each operand, in this order.
        assert re.findall(r"\d+", problem["content"]) == [steps[0][0], *(s[2] for s in steps)]
        assert parse_row(row, "messages", DataConfig()).messages[1].reasoning
    assert seen == set(SIGNS)


def test_an_unknown_name_is_rejected() -> None:
    with pytest.raises(DataError, match="known are synthetic:arithmetic"):
        list(synthetic_rows("synthetic:algebra", seed=1))
