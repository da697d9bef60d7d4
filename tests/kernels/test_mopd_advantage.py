"""mopd_advantage against its definition in float64, and against Eq. 2-4 by hand."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.heads import device_for, skip_unless_served
from nemocascade_kernels import mopd_advantage, mopd_advantage_metrics
from nemocascade_kernels.mopd_advantage import reference
from nemocascade_kernels.mopd_advantage.op import OP
from nemocascade_kernels.testing import PoisonedMemory, random_normal
from torch import Tensor

BACKENDS = ("reference", "triton")
SIZES = (0, 1, 31, 1024, 5003)


def tokens(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """teacher, train and rollout log-probabilities, and weights of which a third are 0."""
    teacher, train, noise = (
        random_normal(size, seed=seed, device=device, scale=0.6) for seed in (1, 2, 3)
    )
    weight = random_normal(size, seed=4, device=device).abs() + 0.01
    weight[::3] = 0
    return teacher - 3, train - 3, train - 3 + noise, weight


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend: str, size: int) -> None:
    skip_unless_served(OP, backend, torch.float32)
    teacher, train, rollout, _ = tokens(size, device_for(backend))
    with PoisonedMemory():
        advantage, importance = mopd_advantage(teacher, train, rollout, backend=backend)
    exact = reference.mopd_advantage(teacher.double(), train.double(), rollout.double())
    torch.testing.assert_close(advantage.double(), exact[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(importance.double(), exact[1], rtol=1e-5, atol=0)
    if size > 100:
        assert 0 < int((importance == 0).sum()) < size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics(backend: str, size: int) -> None:
    skip_unless_served(OP, backend, torch.float32)
    teacher, train, rollout, weight = tokens(size, device_for(backend))
    counted = weight != 0
    for values in (teacher, train, rollout):
        values[~counted] = math.nan
    with PoisonedMemory():
        advantage, importance, metrics = mopd_advantage_metrics(
            teacher, train, rollout, weight, ratio_low=0.6, ratio_high=1.5, backend=backend
        )
    assert not advantage[~counted].any()
    assert not importance[~counted].any()
    a = (teacher - train)[counted].double()
    ratio = (train - rollout)[counted].double().exp()
    w = torch.where((ratio >= 0.6) & (ratio <= 1.5), ratio, 0.0)
    some = max(int(counted.sum()), 1)
    expected = {
        "loss": -(weight[counted] * w * a * train[counted]).sum(),
        "tokens": counted.sum(),
        "advantage": a.sum() / some,
        "advantage_abs": a.abs().sum() / some,
        "ratio": ratio.sum() / some,
        "gated_low": (ratio < 0.6).sum() / some,
        "gated_high": (ratio > 1.5).sum() / some,
    }
    assert list(metrics) == list(expected)
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=2e-5, abs=2e-5), name


def test_gate_is_closed_outside_and_open_on_its_edges() -> None:
    """w_t = r_t 1[0.5 <= r_t <= 2.0]: zero outside, not clamped (Eq. 3)."""
    ratio = torch.tensor([0.4, 0.5, 1.0, 2.0, 2.1])
    zero = torch.zeros(5)
    # log(0.5) and log(2) round; an edge that exp gives back exactly is taken from it.
    rollout = -ratio.log()
    back = (zero - rollout).exp()
    low, high = back[1].item(), back[3].item()
    _, importance = mopd_advantage(zero, zero, rollout, ratio_low=low, ratio_high=high)
    torch.testing.assert_close(importance, torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0]))


def test_no_gradient_and_checks() -> None:
    train = torch.zeros(3, requires_grad=True)
    advantage, importance = mopd_advantage(torch.ones(3), train, torch.zeros(3))
    assert not advantage.requires_grad
    assert not importance.requires_grad
    with pytest.raises(ValueError, match="ratio_low"):
        mopd_advantage(train, train, train, ratio_low=3.0)
    with pytest.raises(ValueError, match=r"rollout_logprob \(2,\)"):
        mopd_advantage(train, train, torch.zeros(2))
    with pytest.raises(ValueError, match=r"float64"):
        mopd_advantage(train, train, torch.zeros(3, dtype=torch.float64))
