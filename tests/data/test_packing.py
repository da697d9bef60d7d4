"""The packing planner: its plans, their balance, and bit-identical results of C++ and Python."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from helpers import packing_reference

from benchmarks.data.lockstep import lockstep_cost
from nemocascade.data import packing
from nemocascade.data.packing import PackingPlan, WorkModel, plan_packing
from nemocascade.runtime import native as library

WORK = WorkModel()
FIELDS = ("documents", "bin_offsets", "fills", "costs", "truncated", "dropped")


def plan(lengths: Any, capacity: int, **settings: Any) -> PackingPlan:
    """A plan with settings that do not matter to the test filled in."""
    defaults: dict[str, Any] = {"group": 16, "work": WORK, "seed": 0, "over_long": "refuse"}
    return plan_packing(lengths, capacity, **defaults | settings)


def reference_plan(lengths: Any, capacity: int, **settings: Any) -> PackingPlan:
    """The same plan by the definition in plain Python."""
    with mock.patch.object(packing, "_native", packing_reference.plan_arrays):
        return plan(lengths, capacity, **settings)


def log_normal(random: np.random.Generator, count: int, capacity: int) -> np.ndarray:
    lengths = capacity / 60 * np.exp(1.3 * random.standard_normal(count))
    return np.clip(lengths, 1, capacity).astype(np.int64)


def uniform(random: np.random.Generator, count: int, capacity: int) -> np.ndarray:
    return random.integers(1, capacity + 1, count)


def middling(random: np.random.Generator, count: int, capacity: int) -> np.ndarray:
    """0.2 to 0.5 of the capacity: few fit together, so spreading needs more bins than FFD."""
    return np.clip(capacity * (0.2 + 0.3 * random.random(count)), 1, capacity).astype(np.int64)


def few_values(random: np.random.Generator, count: int, capacity: int) -> np.ndarray:
    """Ties everywhere, and lengths that just fit or just don't."""
    values = [1, capacity // 3, capacity // 3 + 1, capacity // 2, capacity // 2 + 1, capacity]
    return random.choice(np.clip(values, 1, capacity), count)


def all_equal(random: np.random.Generator, count: int, capacity: int) -> np.ndarray:
    return np.full(count, random.integers(1, capacity + 1))


def all_full(random: np.random.Generator, count: int, capacity: int) -> np.ndarray:
    return np.full(count, capacity)


def word_edges(random: np.random.Generator, count: int, capacity: int) -> np.ndarray:
    """Lengths at the edges of the 64-bit words of the pool's bitmaps."""
    edges = np.array([63, 64, 65, 127, 128, 4095, 4096, 4097, 64**3 - 1, 64**3, 64**3 + 1])
    return random.choice(np.clip(edges, 1, capacity), count)


def no_short(random: np.random.Generator, count: int, capacity: int) -> np.ndarray:
    """Nothing short to fill a gap with."""
    lengths = capacity * (0.03 + 0.04 * random.exponential(size=count))
    return np.clip(lengths, 1, capacity).astype(np.int64)


MAKERS: tuple[Callable[..., np.ndarray], ...] = (
    log_normal,
    uniform,
    middling,
    few_values,
    all_equal,
    all_full,
    word_edges,
    no_short,
)


@pytest.mark.parametrize("capacity", [1, 7, 64, 65, 4096, 4097, 262_144, 262_145])
@pytest.mark.parametrize("make", MAKERS)
def test_native_plan_equals_the_reference_bit_for_bit(
    make: Callable[..., np.ndarray], capacity: int
) -> None:
    random = np.random.default_rng(capacity)
    for count in (0, 1, 2, 17, 400):
        lengths = make(random, count, capacity)
        settings = {
            "group": int(random.integers(1, 20)),
            "seed": int(random.integers(0, 2**63 - 1)),
            "work": WorkModel(*random.random(2)),
        }
        native = plan(lengths, capacity, **settings)
        reference = reference_plan(lengths, capacity, **settings)
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(native, field), getattr(reference, field))


def test_native_plan_equals_the_reference_at_the_greatest_capacity() -> None:
    lengths = log_normal(np.random.default_rng(0), 300, packing.MAX_CAPACITY)
    lengths[7] = packing.MAX_CAPACITY
    native = plan(lengths, packing.MAX_CAPACITY)
    reference = reference_plan(lengths, packing.MAX_CAPACITY)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(native, field), getattr(reference, field))


@pytest.mark.parametrize("make", MAKERS)
def test_every_document_is_packed_once_and_fits(make: Callable[..., np.ndarray]) -> None:
    lengths = make(np.random.default_rng(1), 3000, 5000)
    result = plan(lengths, 5000)
    assert sorted(result.documents) == list(range(3000))
    assert result.bin_offsets[0] == 0
    assert result.bin_offsets[-1] == 3000
    for index in range(len(result)):
        inside = lengths[result.bin(index)]
        assert inside.size >= 1
        assert inside.sum() == result.fills[index] <= 5000
        assert list(inside) == sorted(inside, reverse=True)
        assert result.costs[index] == WORK.linear * inside.sum() + WORK.quadratic * (
            (inside**2).sum()
        )
    assert result.fill == pytest.approx(lengths.sum() / (5000 * len(result)))


def naive_first_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[int]:
    """The textbook's: each document, longest first, to the first bin that has space for it."""
    spaces: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        for index, space in enumerate(spaces):
            if space >= length:
                spaces[index] -= length
                break
        else:
            spaces.append(capacity - length)
    return [capacity - space for space in spaces]


@pytest.mark.parametrize("make", MAKERS)
def test_closing_empty_bins_is_first_fit_decreasing(make: Callable[..., np.ndarray]) -> None:
    lengths = make(np.random.default_rng(2), 500, 1000)
    bins = packing_reference.Bins(lengths.size, 1000)
    packing_reference.close(sorted(lengths.tolist(), reverse=True), 0, 0, False, bins)
    assert bins.fills == naive_first_fit_decreasing(lengths, 1000)


@pytest.mark.parametrize("make", MAKERS)
def test_balance_costs_at_most_one_bin_in_a_thousand(make: Callable[..., np.ndarray]) -> None:
    lengths = make(np.random.default_rng(3), 2000, 10_000)
    first_fit = len(naive_first_fit_decreasing(lengths, 10_000))
    assert len(plan(lengths, 10_000)) <= first_fit + max(first_fit // 1000, int(first_fit >= 100))


def test_first_fit_decreasing_is_kept_where_spreading_wastes_bins() -> None:
    lengths = middling(np.random.default_rng(4), 4000, 10_000)
    assert sorted(plan(lengths, 10_000).fills) == sorted(
        naive_first_fit_decreasing(lengths, 10_000)
    )


def test_no_remainder_is_left_that_no_document_fits() -> None:
    # The longest, 7, would leave 3, which nothing fits; 6 leaves 4, which one does.
    pool = packing_reference.LengthPool([7, 6, 4])
    assert packing_reference.pick(pool, 10, look_ahead=False) == 7
    assert packing_reference.pick(pool, 10, look_ahead=True) == 6
    assert packing_reference.pick(pool, 7, look_ahead=True) == 7
    assert packing_reference.pick(pool, 5, look_ahead=True) == 4
    assert packing_reference.pick(pool, 3, look_ahead=True) == 0


def test_balance_level_gives_long_documents_bins_of_their_own() -> None:
    assert packing_reference.balance_level([10, 1, 1, 1, 1], 3) == 2
    assert packing_reference.balance_level([3, 3, 3, 3], 2) == 18
    assert packing_reference.balance_level([9], 1) == 81


def test_bins_are_alike_where_no_document_is_very_long() -> None:
    lengths = np.random.default_rng(5).integers(10, 2_000, 20_000)
    spread = plan(lengths, 32_768, work=WorkModel(0, 1)).costs[:-1]
    bins = packing_reference.Bins(lengths.size, 32_768)
    packing_reference.close(sorted(lengths.tolist(), reverse=True), 0, 0, False, bins)
    first_fit = np.array(bins.squares[:-1])
    assert first_fit.max() / first_fit.min() > 20
    assert spread.max() / spread.min() < 1.15


@pytest.mark.parametrize("seed", range(6))
def test_bins_are_mixed_whatever_the_lengths_of_the_types(seed: int) -> None:
    """Documents of a type have about one length; first-fit-decreasing would fill bins by type."""
    rng = np.random.default_rng(seed)
    types = rng.choice([30, 36, 45, 60, 75, 110], 3000, p=[0.3, 0.2, 0.2, 0.15, 0.1, 0.05])
    costs = plan(types + rng.integers(-4, 5, 3000), 512, work=WorkModel(0, 1)).costs
    assert costs.std() < 0.15 * costs.mean()


@pytest.mark.parametrize("work", [WORK, WorkModel(0, 1), WorkModel(1, 0)])
def test_any_divisor_of_the_group_is_balanced(work: WorkModel) -> None:
    lengths = log_normal(np.random.default_rng(6), 60_000, 65_536)
    costs = plan(lengths, 65_536, work=work).costs
    shuffled = np.random.default_rng(0).permutation(costs)
    for ranks, limit in ((1, 1.0), (2, 1.1), (4, 1.1), (8, 1.1), (16, 1.15)):
        assert lockstep_cost(costs, ranks) <= limit + 1e-12
        if ranks > 1 and work.quadratic:
            assert lockstep_cost(shuffled, ranks) > lockstep_cost(costs, ranks)


def test_groups_are_neighbours_in_work_and_the_cheapest_bins_come_last() -> None:
    costs = plan(log_normal(np.random.default_rng(7), 6_000, 65_536), 65_536, group=8).costs
    full = costs.size // 8 * 8
    assert full < costs.size
    by_cost = sorted(costs, reverse=True)
    expected = {tuple(reversed(by_cost[i : i + 8])) for i in range(0, full, 8)}
    groups = [tuple(costs[i : i + 8]) for i in range(0, full, 8)]
    assert set(groups) == expected
    assert list(costs[full:]) == by_cost[full:][::-1]
    firsts = [group[0] for group in groups]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


def as_sets(result: PackingPlan) -> set[frozenset[int]]:
    return {frozenset(result.bin(index).tolist()) for index in range(len(result))}


def test_what_shares_a_bin_depends_on_neither_group_nor_work() -> None:
    lengths = log_normal(np.random.default_rng(8), 2_000, 8_192)
    one = plan(lengths, 8_192, group=16)
    other = plan(lengths, 8_192, group=4, work=WorkModel(0, 1))
    assert as_sets(one) == as_sets(other)
    assert one.documents.tolist() != other.documents.tolist()


def test_seed_decides_the_order() -> None:
    lengths = log_normal(np.random.default_rng(9), 2_000, 8_192)
    first, again, other = (plan(lengths, 8_192, seed=seed) for seed in (3, 3, 4))
    assert first.documents.tolist() == again.documents.tolist()
    assert first.documents.tolist() != other.documents.tolist()
    assert as_sets(first) != as_sets(other)
    assert sorted(first.fills) == sorted(other.fills)


def test_documents_of_equal_length_are_mixed() -> None:
    # Two files of equal lengths, one after the other: each bin must hold documents of both.
    result = plan(np.full(400, 10), 200)
    for index in range(len(result)):
        assert 0 < (result.bin(index) < 200).sum() < 20


def test_over_long_documents() -> None:
    lengths = [5, 12, 10, 11, 3]
    truncated = plan(lengths, 10, over_long="truncate")
    assert truncated.truncated.tolist() == [1, 3]
    assert truncated.dropped.size == 0
    assert sorted(truncated.documents) == [0, 1, 2, 3, 4]
    assert sorted(truncated.fills) == [8, 10, 10, 10]
    dropped = plan(lengths, 10, over_long="drop")
    assert dropped.dropped.tolist() == [1, 3]
    assert dropped.truncated.size == 0
    assert as_sets(dropped) == {frozenset({2}), frozenset({0, 4})}
    assert "truncated 0, dropped 2" in dropped.describe()
    with pytest.raises(ValueError, match=r"document 1 has 12 tokens, and capacity is 10 \(2 of 5"):
        plan(lengths, 10, over_long="refuse")


def test_all_documents_dropped_is_an_empty_plan() -> None:
    result = plan([11, 12], 10, over_long="drop")
    assert len(result) == 0
    assert result.bin_offsets.tolist() == [0]
    assert result.dropped.tolist() == [0, 1]
    assert result.fill == 1.0
    assert lockstep_cost(result.costs, 8) == 1.0


@pytest.mark.parametrize(
    ("lengths", "settings", "message"),
    [
        ([3, 0, 2], {}, "document 1 has 0 tokens"),
        ([3, -4], {}, "document 1 has -4 tokens"),
        ([1.5], {}, "must be integers"),
        ([[1, 2]], {}, "one dimension"),
        ([1], {"capacity": 0}, r"capacity\(0\)"),
        ([1], {"capacity": (1 << 24) + 1}, r"capacity\(16777217\)"),
        ([1], {"group": 0}, r"group\(0\)"),
        ([1], {"seed": -1}, r"seed\(-1\)"),
        ([1], {"seed": 1 << 63}, "seed"),
        ([11], {"over_long": "shorten"}, "over_long='shorten'"),
    ],
)
def test_wrong_arguments_are_named(lengths: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(lengths, **{"capacity": 10} | settings)


def test_all_wrong_arguments_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"capacity\(0\).*group\(0\).*document 0 has -1"):
        plan([-1], 0, group=0)


def test_native_operator_checks_for_itself() -> None:
    import torch

    plan([1], 10)
    call = torch.ops.nemocascade.plan_packing
    with pytest.raises(RuntimeError, match=r"lengths\[1\] = 11 must lie in 1\.\.capacity\(10\)"):
        call(torch.tensor([3, 11]), 10, 16, 1.0, 0.0, 0)
    with pytest.raises(RuntimeError, match="must be a contiguous CPU tensor of 1 elements"):
        call(torch.tensor([3.0]), 10, 16, 1.0, 0.0, 0)


def test_missing_library_says_how_to_build_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "_native.so")
    library.limitation.cache_clear()
    with pytest.raises(OSError, match="make setup"):
        plan([1], 10)
    library.limitation.cache_clear()


def test_lockstep_cost_of_a_small_example() -> None:
    costs = np.array([1.0, 3.0, 2.0, 2.0, 4.0])
    assert lockstep_cost(costs, 1) == 1.0
    assert lockstep_cost(costs, 2) == pytest.approx(2 * (3 + 2 + 4) / 12)
    assert lockstep_cost(costs, 8) == pytest.approx(8 * 4 / 12)
    assert lockstep_cost(costs[:0], 8) == 1.0


def test_bin_out_of_range() -> None:
    result = plan([1, 2], 10)
    assert result.bin(0).size == 2
    for index in (-1, 1):
        with pytest.raises(IndexError, match="1 bins"):
            result.bin(index)


def test_work_model() -> None:
    nano = WorkModel.of_transformer(
        active_parameters=3.2e9, attention_layers=6, attention_width=4096
    )
    assert nano.linear == 6 * 3.2e9
    assert nano.quadratic == 6 * 6 * 4096
    # The default is the same model in units of one token's linear work.
    assert WORK.quadratic / WORK.linear == pytest.approx(nano.quadratic / nano.linear, rel=0.01)
    for wrong in ((-1.0, 1.0), (1.0, -1.0), (0.0, 0.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="WorkModel"):
            WorkModel(*wrong)


@pytest.mark.parametrize("median_tokens", [650, 8_000])
def test_goals_at_a_hundred_thousand_documents(median_tokens: int) -> None:
    random = np.random.default_rng(10)
    lengths = median_tokens * np.exp(1.2 * random.standard_normal(100_000))
    result = plan(np.clip(lengths, 16, 262_144).astype(np.int64), 262_144)
    assert result.fill >= 0.998  # the last bin alone is 0.2 % of the smaller set
    assert lockstep_cost(result.costs, 8) <= 1.10
    assert lockstep_cost(result.costs, 16) <= 1.15


@pytest.mark.slow
def test_goals_at_a_million_documents() -> None:
    random = np.random.default_rng(11)
    lengths = 4_000 * np.exp(1.3 * random.standard_normal(1_000_000))
    checked = np.clip(lengths, 16, 262_144).astype(np.int64)
    start = time.process_time()
    result = plan(checked, 262_144)
    assert time.process_time() - start <= 1.5
    assert result.fill >= 0.999
    assert lockstep_cost(result.costs, 8) <= 1.10
    assert lockstep_cost(result.costs, 16) <= 1.15
