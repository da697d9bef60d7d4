"""router_logits: bits on a CPU, tensors kept for backward, and accuracy of the gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import kept_for_backward
from nemocascade_kernels import router_logits
from nemocascade_kernels.moe_router.logits import float_gradients, split_gradients
from nemocascade_kernels.testing import assert_as_accurate, assert_same_bits, random_normal
from torch import Tensor


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = random_normal(67, 96, seed=1), random_normal(33, 96, seed=2, scale=0.1)
    return x.to(dtype), weight.to(dtype), random_normal(67, 33, seed=3, scale=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_gives_the_bits_of_a_linear_layer_in_float32(dtype: torch.dtype) -> None:
    x, weight, grad = inputs(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    expected = F.linear(leaves[0].float(), leaves[1].float())
    expected.backward(grad)
    ours = [t.clone().requires_grad_() for t in (x, weight)]
    logits = router_logits(*ours)
    logits.backward(grad)
    assert torch.equal(logits, expected)
    for leaf, other in zip(ours, leaves, strict=True):
        assert leaf.grad is not None
        assert other.grad is not None
        assert_same_bits("gradient", leaf.grad, other.grad)


def test_backward_keeps_the_inputs_alone() -> None:
    x, weight, _ = inputs(torch.bfloat16)
    kept = kept_for_backward(lambda: router_logits(x, weight.requires_grad_()))
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), weight.data_ptr()]


def test_split_gradients_are_as_accurate_as_float32() -> None:
    x, weight, grad = inputs(torch.bfloat16)
    exact = grad.double() @ weight.double(), grad.double().t() @ x.double()
    single = float_gradients(grad, x, weight, True, True)
    for name, ours, torchs, value in zip(
        ("x", "weight"), split_gradients(grad, x, weight, True, True), single, exact,
        strict=True,
    ):  # fmt: skip
        assert ours is not None
        assert torchs is not None
        assert ours.dtype == torchs.dtype
        assert_as_accurate(name, ours, torchs, value, factor=1.5)
    assert split_gradients(grad, x, weight, False, False) == (None, None)


def test_main_grad_gets_the_gradient_in_float32() -> None:
    x, weight, grad = inputs(torch.bfloat16)
    weight.requires_grad_()
    weight.main_grad = torch.ones(33, 96)
    router_logits(x, weight, accumulate_main_grad=True).backward(grad)
    assert weight.grad_added_to_main_grad
    expected = 1 + grad.t() @ x.float()
    assert torch.equal(weight.main_grad, expected)


def test_inputs_that_do_not_fit_are_rejected() -> None:
    x, weight, _ = inputs(torch.bfloat16)
    with pytest.raises(ValueError, match=r"x \[67, 96\] torch.bfloat16 and weight \[96, 33\]"):
        router_logits(x, weight.t())
    with pytest.raises(ValueError, match="of one dtype"):
        router_logits(x, weight.float())
    with pytest.raises(ValueError, match="has no main_grad"):
        router_logits(x, weight.requires_grad_(), accumulate_main_grad=True)
