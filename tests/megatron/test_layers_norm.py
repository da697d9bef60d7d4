"""RMSNorm and the gated RMSNorm of Mamba-2 against their definitions."""

from __future__ import annotations

import pytest
import torch
from helpers.layers import assert_near, draw, value_and_gradients
from torch import Tensor

from nemocascade.megatron import native
from nemocascade.megatron.layers.norm import gated_rms_norm, rms_norm

DTYPES = [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def normed(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", [(7,), (5, 1, 7), (3, 2, 33), (300, 2, 40)])
def test_rms_norm(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert native.lacks("rms_norm") is None, "the library must be built for the tests"
    if not compiled:
        monkeypatch.setattr(native, "lacks", lambda *_names: "not built")
    inputs = [draw(*shape, dtype=dtype), draw(shape[-1], seed=1, dtype=dtype)]
    upstream = draw(*shape, seed=2)
    ours = value_and_gradients(lambda x, w: rms_norm(x, w, 1e-3), inputs, upstream)
    exact = [t.double() for t in inputs]
    theirs = value_and_gradients(lambda x, w: normed(x, 1e-3) * w, exact, upstream)
    assert_near(ours, theirs, tolerance, ["y", "dx", "dw"])
    assert [t.dtype for t in ours] == [dtype] * 3


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_gated_rms_norm(groups: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs = [draw(9, 12, dtype=dtype), draw(9, 12, seed=1, dtype=dtype), draw(12, dtype=dtype)]
    upstream = draw(9, 12, seed=2)

    def definition(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        gated = y * z * torch.sigmoid(z)
        return torch.cat([normed(part, 1e-5) for part in gated.chunk(groups, -1)], -1) * weight

    ours = value_and_gradients(lambda *i: gated_rms_norm(*i, groups, 1e-5), inputs, upstream)
    theirs = value_and_gradients(definition, [t.double() for t in inputs], upstream)
    assert_near(ours, theirs, tolerance, ["out", "dy", "dz", "dw"])


def test_compiled_bits_depend_on_their_row_alone() -> None:
    """Neither on the threads nor, but for the weight's gradient, on the other rows."""
    inputs, upstream = [draw(700, 40), draw(40, seed=1)], draw(700, 40, seed=2)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(value_and_gradients(lambda *i: rms_norm(*i, 1e-5), inputs, upstream))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    inputs[0][::2] = float("nan")
    changed = value_and_gradients(lambda *i: rms_norm(*i, 1e-5), inputs, upstream)
    assert all(torch.equal(a[1::2], b[1::2]) for a, b in zip(changed[:2], found[0], strict=False))


def test_rows_may_be_strided() -> None:
    inputs, upstream = [draw(6, 10), draw(10, seed=1)], draw(6, 10, seed=2)
    expected = value_and_gradients(lambda *i: rms_norm(*i, 1e-5), inputs, upstream)
    apart = value_and_gradients(
        lambda x, w: rms_norm(x.t().contiguous().t(), w, 1e-5),
        inputs,
        upstream.t().contiguous().t(),
    )
    assert_near(apart, expected, 1e-6, ["y", "dx", "dw"])


def test_a_row_of_zeros_stays_zero_and_finite() -> None:
    x = torch.zeros(2, 5, requires_grad=True)
    y = rms_norm(x, torch.ones(5), 1e-5)
    y.sum().backward()
    assert bool((y == 0).all())
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
