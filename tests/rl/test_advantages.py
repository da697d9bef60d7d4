"""Group advantages against Eq. 1 computed by hand, with the cases where it is undefined."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from nemocascade.recipe.grpo import GrpoConfig
from nemocascade.recipe.rl import RolloutConfig
from nemocascade.rl.advantages import (
    group_advantages,
    is_informative,
    overlong_penalty,
    token_weights,
)


def all_valid(rewards: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(rewards, dtype=torch.bool)


def test_advantages_are_those_of_the_paper() -> None:
    rows = [[1.0, 0.0, 0.0, 1.0], [0.25, 0.5, 0.75, 0.1]]
    rewards = torch.tensor(rows, dtype=torch.float64)
    settings = GrpoConfig(std_epsilon=0.0, unbiased_std=False)
    found = group_advantages(rewards, all_valid(rewards), settings)
    for row, values in zip(rows, found.tolist(), strict=True):
        mean, deviation = statistics.fmean(row), statistics.pstdev(row)
        assert values == pytest.approx([(r - mean) / deviation for r in row], rel=1e-12)


def test_settings_change_the_mean_and_the_deviation() -> None:
    row = [1.0, 0.0, 0.0, 0.5]
    rewards = torch.tensor([row])
    mean = statistics.fmean(row)
    sample = group_advantages(rewards, all_valid(rewards), GrpoConfig(std_epsilon=0.0))
    assert sample[0].tolist() == pytest.approx([(r - mean) / statistics.stdev(row) for r in row])
    others = [(sum(row) - r) / 3 for r in row]
    out = group_advantages(
        rewards, all_valid(rewards), GrpoConfig(leave_one_out=True, scale_by_std=False)
    )
    assert out[0].tolist() == pytest.approx([r - o for r, o in zip(row, others, strict=True)])


@pytest.mark.parametrize("unbiased", [True, False])
def test_leave_one_out_rewards_are_divided_by_the_deviation_of_the_others(unbiased: bool) -> None:
    """The rule of NeMo-RL's `use_leave_one_out_baseline` with `normalize_rewards`, by hand."""
    rows = [[1.0, 0.25, 0.0, 0.5], [0.1, 0.1, 0.1, 0.7], [1.0, 0.0, 0.0, 0.0]]
    rewards = torch.tensor(rows, dtype=torch.float64)
    settings = GrpoConfig(leave_one_out=True, unbiased_std=unbiased)
    found = group_advantages(rewards, all_valid(rewards), settings)
    deviation = statistics.stdev if unbiased else statistics.pstdev
    for row, values in zip(rows, found.tolist(), strict=True):
        for number, value in enumerate(values):
            others = row[:number] + row[number + 1 :]
            # 0.1 + 0.1 + 0.1 rounds: equal rewards have no deviation all the same.
            spread = deviation(others) + 1e-6 if len(set(others)) > 1 else 1.0
            assert value == pytest.approx((row[number] - statistics.fmean(others)) / spread)
    # A lone success stands undivided; its failures are divided.
    assert found[2].tolist()[0] == 1.0


def test_leave_one_out_of_two_rewards_is_their_difference() -> None:
    rewards = torch.tensor([[0.75, 0.0, 0.5]])
    valid = torch.tensor([[True, False, True]])
    found = group_advantages(rewards, valid, GrpoConfig(leave_one_out=True))
    assert found.tolist() == [[0.25, 0.0, -0.25]]


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e-9, 1e9])
def test_equal_rewards_teach_nothing(value: float) -> None:
    """The mean of equal rewards need not round to them: the advantages must still be 0."""
    rewards = torch.full((1, 7), value, dtype=torch.float64)
    assert not is_informative(rewards, all_valid(rewards)).any()
    found = group_advantages(rewards, all_valid(rewards), GrpoConfig(std_epsilon=0.0))
    assert found.eq(0).all()


def test_a_failed_verifier_is_excluded() -> None:
    rewards = torch.tensor([[1.0, math.nan, 0.0, 1.0], [1.0, math.nan, math.nan, 1.0]])
    valid = ~rewards.isnan()
    found = group_advantages(rewards, valid, GrpoConfig())
    alone = group_advantages(rewards[:1, [0, 2, 3]], all_valid(rewards[:1, :3]), GrpoConfig())
    assert found[0, [0, 2, 3]].tolist() == pytest.approx(alone[0].tolist())
    assert found[0, 1] == 0
    assert found[1].eq(0).all()
    assert is_informative(rewards, valid).tolist() == [True, False]
    nobody = torch.zeros(1, 4, dtype=torch.bool)
    assert group_advantages(rewards[:1], nobody, GrpoConfig()).eq(0).all()


def test_overlong_penalty_grows_over_the_buffer() -> None:
    settings = RolloutConfig(max_response_tokens=100, overlong_penalty=2.0, overlong_buffer=20)
    found = [overlong_penalty(n, settings) for n in (10, 80, 85, 90, 100)]
    assert found == pytest.approx([0.0, 0.0, 0.5, 1.0, 2.0])
    hard = RolloutConfig(max_response_tokens=100, overlong_penalty=2.0)
    assert [overlong_penalty(n, hard) for n in (99, 100)] == [0.0, 2.0]
    assert overlong_penalty(100, RolloutConfig(max_response_tokens=100)) == 0.0


def test_weights_make_the_three_means() -> None:
    lengths, groups = torch.tensor([2, 6, 4]), torch.tensor([0, 0, 1])

    def share(normalize: str) -> list[float]:
        weight = token_weights(lengths, groups, GrpoConfig(normalize=normalize))  # type: ignore[arg-type]
        of_sequence = weight * lengths
        return (of_sequence / of_sequence.sum()).tolist()

    assert share("batch") == pytest.approx([2 / 12, 6 / 12, 4 / 12])
    assert share("group") == pytest.approx([1 / 8, 3 / 8, 1 / 2])
    assert share("sequence") == pytest.approx([1 / 3, 1 / 3, 1 / 3])
