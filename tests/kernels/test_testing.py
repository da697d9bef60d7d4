"""The error measures of the other tests can fail."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from nemocascade_kernels.testing import (
    PoisonedMemory,
    assert_as_accurate,
    assert_same_bits,
    max_error,
    random_integers,
    random_normal,
    rms_error,
)
from torch import Tensor


def test_poison_reaches_every_maker() -> None:
    like = torch.zeros(2, dtype=torch.int32)
    with PoisonedMemory():
        made = [torch.empty(3), torch.zeros(3).new_empty(2), torch.empty_like(torch.ones(2))]
        numbers = torch.empty_like(like)
        ones = torch.ones(3)
    assert all(tensor.isnan().all() for tensor in made)
    assert bool((numbers == torch.iinfo(torch.int32).min).all())
    assert bool((ones == 1).all())
    assert not torch.zeros(3).isnan().any()


def test_poison_reaches_backward() -> None:
    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return torch.empty_like(gradient)

    x = torch.ones(3, requires_grad=True)
    with PoisonedMemory():
        Careless.apply(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isnan().all()


def test_accuracy_is_judged_beside_torchs() -> None:
    exact = random_normal(1000, seed=0, dtype=torch.float64)
    torchs = exact.bfloat16()
    assert_as_accurate("same", torchs, torchs, exact)
    with pytest.raises(AssertionError, match=r"off: rms error"):
        assert_as_accurate("off", (exact * 1.02).bfloat16(), torchs, exact)
    spoiled = torchs.clone()
    spoiled[3] += 0.2
    with pytest.raises(AssertionError, match=r"one: (max|rms) error"):
        assert_as_accurate("one", spoiled, torchs, exact, factor=3)
    spoiled[3] = math.nan
    with pytest.raises(AssertionError, match="nan"):
        assert_as_accurate("nan", spoiled, torchs, exact)


def test_measures() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert rms_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert max_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.125)
    assert (
        rms_error(torch.zeros(0), torch.zeros(0)) == max_error(torch.zeros(0), torch.zeros(0)) == 0
    )
    with pytest.raises(AssertionError, match="shapes differ"):
        rms_error(torch.zeros(2), torch.zeros(3))


def test_same_bits() -> None:
    nan = torch.tensor([1.0, math.nan])
    assert_same_bits("nan", nan, nan.clone())
    with pytest.raises(AssertionError, match="of 8 bytes differ"):
        assert_same_bits("next", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0000002]))
    with pytest.raises(AssertionError, match="expected"):
        assert_same_bits("dtype", torch.zeros(2), torch.zeros(2).half())


def test_inputs_repeat() -> None:
    assert_same_bits("normal", random_normal(5, seed=3), random_normal(5, seed=3))
    assert not torch.equal(random_normal(5, seed=3), random_normal(5, seed=4))
    drawn = random_integers(1000, low=2, high=5, seed=1)
    assert drawn.unique().tolist() == [2, 3, 4]
