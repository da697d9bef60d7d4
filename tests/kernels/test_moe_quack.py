"""quack-kernels in `moe_experts`: our arguments against a double that checks them.

Where quack runs, the tests of test_moe_experts.py run it (backend "quack").
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from nemocascade_kernels import backends, moe_experts, moe_route
from nemocascade_kernels.backends import BackendUnavailableError
from nemocascade_kernels.moe_experts import op
from nemocascade_kernels.testing import poison, random_normal
from torch import Tensor

EXPERTS, TOP_K, HIDDEN, WIDTH, TOKENS = 4, 2, 16, 24, 37


class Double:
    """`quack.gemm_interface` by torch's products: shapes and layouts as the package wants them."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def gemm(self, a: Tensor, b: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
        self.calls.append("gemm")
        return self._product(a, b, out, 0.0, **options)

    def gemm_add_inplace(self, a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
        self.calls.append("gemm_add_inplace")
        self._product(a, b, out, 1.0, **options)

    def gemm_act(
        self, a: Tensor, b: Tensor, activation: str, store_preact: bool, **options: Any
    ) -> tuple[Tensor | None, Tensor]:
        self.calls.append("gemm_act")
        assert activation == "relu_sq"
        h = self._product(a, b, None, 0.0, **options)
        return h if store_preact else None, h.relu().square()

    def _product(
        self,
        a: Tensor,
        b: Tensor,
        out: Tensor | None,
        beta: float,
        *,
        A_idx: Tensor | None = None,
        cu_seqlens_m: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        tuned: bool,
    ) -> Tensor:
        assert not tuned
        bounds = cu_seqlens_m if cu_seqlens_m is not None else cu_seqlens_k
        assert bounds is not None
        assert bounds.dtype == torch.int32
        assert A_idx is None or A_idx.dtype == torch.int32
        ends = bounds.tolist()
        spans = [slice(first, end) for first, end in itertools.pairwise(ends)]
        if cu_seqlens_m is not None:
            assert a.stride(1) == 1
            assert b.shape == (len(spans), a.shape[1], b.shape[2])
            rows = a if A_idx is None else a[A_idx.long()]
            out = poison(rows.new_empty(rows.shape[0], b.shape[2])) if out is None else out
            for matrix, span in zip(b, spans, strict=True):
                out[span] = rows[span] @ matrix
            return out
        assert a.stride(0) == 1, "the left matrix must be m-major"
        columns = a if A_idx is None else a[:, A_idx.long()]
        assert columns.shape[1] == b.shape[0]
        out = a.new_zeros(len(spans), a.shape[0], b.shape[1]) if out is None else out
        for matrix, span in zip(out, spans, strict=True):
            matrix.copy_(
                columns[:, span].float() @ b[span].float() + (beta * matrix if beta else 0)
            )
        return out


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Double:
    found = Double()
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", found)
    monkeypatch.setattr(backends, "_package_limitation", lambda *_: None)
    monkeypatch.setattr(op, "_hopper_limitation", lambda *_: None)
    return found


def results(activation: str, backend: str, dtype: torch.dtype, main: bool) -> list[Tensor]:
    """Output, gradients of x and the routing weights, then of both weights."""
    gates = 2 if activation == "swiglu" else 1
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(TOKENS, generator=generator) > 0.3
    logits = random_normal(TOKENS, EXPERTS, seed=1)
    logits[:, 2] = -50.0  # an expert without tokens
    routing = moe_route(logits, TOP_K, token_mask=mask, backend="reference")
    routing.weights.requires_grad_()
    x = random_normal(TOKENS, HIDDEN, seed=2).bfloat16().to(dtype).requires_grad_()
    w_up = random_normal(EXPERTS, gates * WIDTH, HIDDEN, seed=3, scale=0.25).bfloat16().to(dtype)
    w_down = random_normal(EXPERTS, HIDDEN, WIDTH, seed=4, scale=0.2).bfloat16().to(dtype)
    weights: list[Any] = [w_up.requires_grad_(), w_down.requires_grad_()]
    for weight in weights if main else ():
        weight.main_grad = torch.ones(weight.shape)
    y = moe_experts(
        x, routing, *weights, activation=activation, accumulate_main_grad=main, backend=backend
    )
    y.backward(random_normal(TOKENS, HIDDEN, seed=5).to(dtype))
    assert x.grad is not None
    assert routing.weights.grad is not None
    grads = [w.main_grad - 1.0 if main else w.grad for w in weights]
    return [y.detach(), x.grad, routing.weights.grad, *grads]


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("main", [False, True], ids=["grad", "main_grad"])
def test_equals_the_definition(double: Double, activation: str, main: bool) -> None:
    ours = results(activation, "quack", torch.bfloat16, main)
    exact = results(activation, "reference", torch.float32, False)
    for mine, expected in zip(ours, exact, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(mine.float(), expected, rtol=0.03, atol=0.02 * scale)
    products = {"relu2": ["gemm_act", "gemm"], "swiglu": ["gemm", "gemm"]}[activation]
    gradients = ["gemm_add_inplace"] * 2 if main else ["gemm"] * 2
    assert double.calls == [*products, "gemm", *gradients, "gemm"]


def test_nothing_is_kept_without_gradients(double: Double) -> None:
    routing = moe_route(random_normal(5, EXPERTS, seed=1), 1, backend="reference")
    x, w_up = torch.ones(5, HIDDEN).bfloat16(), torch.ones(EXPERTS, WIDTH, HIDDEN).bfloat16()
    y = moe_experts(x, routing, w_up, w_up.mT.contiguous(), backend="quack")
    torch.testing.assert_close(y.float(), torch.full((5, HIDDEN), 256.0 * WIDTH), rtol=0.01, atol=0)


def test_unfit_calls_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    routing = moe_route(torch.zeros(3, 2), 1, backend="reference")
    x, w = torch.zeros(3, 8).bfloat16(), torch.zeros(2, 8, 8).bfloat16()
    with pytest.raises(BackendUnavailableError, match=r"pip install quack-kernels|needs CUDA"):
        moe_experts(x, routing, w, w, backend="quack")
    monkeypatch.setattr(backends, "_package_limitation", lambda *_: None)
    monkeypatch.setattr(op, "_hopper_limitation", lambda *_: None)
    with pytest.raises(BackendUnavailableError, match=r"multiples of 8, and got \[12\]"):
        moe_experts(x, routing, w.new_zeros(2, 12, 8), w.new_zeros(2, 8, 12), backend="quack")
    with pytest.raises(BackendUnavailableError, match=r"it takes torch\.bfloat16, torch\.float16"):
        moe_experts(x.float(), routing, w.float(), w.float(), backend="quack")
    assert op.OP.chosen(x, w, w) != "quack", "it runs only when asked for by name"
