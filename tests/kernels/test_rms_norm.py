"""RMSNorm, plain and gated by groups: every implementation against its definition."""

from __future__ import annotations

import pytest
import torch
from helpers.layers import assert_near, draw, value_and_gradients
from nemocascade_kernels import rms_norm
from nemocascade_kernels.backends import BackendUnavailableError
from nemocascade_kernels.rms_norm.op import OP
from nemocascade_kernels.testing import PoisonedMemory

DTYPES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}
KINDS = [
    (backend, dtype)
    for backend in ("native", "torch", "reference")
    for dtype in DTYPES
    if (backend, dtype) not in (("native", torch.float64), ("reference", torch.float64))
]


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
@pytest.mark.parametrize("shape", [(7,), (5, 1, 7), (3, 2, 33), (300, 2, 40)])
def test_plain(shape: tuple[int, ...], backend: str, dtype: torch.dtype) -> None:
    inputs = [draw(*shape, dtype=dtype), draw(shape[-1], seed=1, dtype=dtype)]
    upstream = draw(*shape, seed=2)
    with PoisonedMemory():
        ours = value_and_gradients(
            lambda x, w: rms_norm(x, w, 1e-3, backend=backend), inputs, upstream
        )
    exact = [t.double() for t in inputs]
    theirs = value_and_gradients(
        lambda x, w: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3) * w, exact, upstream
    )
    assert_near(ours, theirs, DTYPES[dtype], ["y", "dx", "dw"])
    assert [t.dtype for t in ours] == [dtype] * 3


@pytest.mark.parametrize(("backend", "dtype"), [kind for kind in KINDS if kind[0] != "native"])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_gated(groups: int, backend: str, dtype: torch.dtype) -> None:
    inputs = [draw(9, 12, dtype=dtype), draw(12, dtype=dtype), draw(9, 12, seed=1, dtype=dtype)]
    upstream = draw(9, 12, seed=2)

    def definition(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        parts = (x * gate * torch.sigmoid(gate)).chunk(groups, -1)
        return (
            torch.cat([p / torch.sqrt((p * p).mean(-1, keepdim=True) + 1e-5) for p in parts], -1)
            * weight
        )

    ours = value_and_gradients(
        lambda x, w, z: rms_norm(x, w, 1e-5, z, groups, backend=backend), inputs, upstream
    )
    theirs = value_and_gradients(definition, [t.double() for t in inputs], upstream)
    assert_near(ours, theirs, DTYPES[dtype], ["y", "dx", "dw", "dgate"])
    assert [t.dtype for t in ours] == [dtype] * 4


def test_native_bits_depend_on_their_row_alone() -> None:
    """Neither on the threads nor, but for the weight's gradient, on the other rows."""
    inputs, upstream = [draw(700, 40), draw(40, seed=1)], draw(700, 40, seed=2)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(
                value_and_gradients(lambda *i: rms_norm(*i, backend="native"), inputs, upstream)
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    inputs[0][::2] = float("nan")
    changed = value_and_gradients(lambda *i: rms_norm(*i, backend="native"), inputs, upstream)
    assert all(torch.equal(a[1::2], b[1::2]) for a, b in zip(changed[:2], found[0], strict=False))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_rows_may_be_strided(backend: str) -> None:
    inputs, upstream = [draw(6, 10), draw(10, seed=1)], draw(6, 10, seed=2)
    expected = value_and_gradients(lambda *i: rms_norm(*i, backend=backend), inputs, upstream)
    apart = value_and_gradients(
        lambda x, w: rms_norm(x.t().contiguous().t(), w, backend=backend),
        inputs,
        upstream.t().contiguous().t(),
    )
    assert_near(apart, expected, 1e-6, ["y", "dx", "dw"])


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_a_row_of_zeros_stays_zero_and_finite(backend: str) -> None:
    x = torch.zeros(2, 5, requires_grad=True)
    y = rms_norm(x, torch.ones(5), backend=backend)
    y.sum().backward()
    assert bool((y == 0).all())
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_which_implementation_runs() -> None:
    x = draw(2, 4)
    assert OP.chosen(x) == OP.chosen(x.bfloat16()) == "native", "build it first"
    assert OP.chosen(x.double()) == OP.chosen(x, x) == OP.chosen(x.to("meta")) == "torch"
    with pytest.raises(BackendUnavailableError, match="it has no gate"):
        rms_norm(x, draw(4), gate=x, backend="native")


def test_wrong_shapes_are_named() -> None:
    x = draw(3, 4)
    with pytest.raises(ValueError, match=r"x \[3, 4\], weight \[5\]"):
        rms_norm(x, draw(5))
    with pytest.raises(ValueError, match=r"gate \[3, 5\]"):
        rms_norm(x, draw(4), gate=draw(3, 5))
    with pytest.raises(ValueError, match="3 groups must divide the 4 columns"):
        rms_norm(x, draw(4), gate=x, groups=3)
    with pytest.raises(ValueError, match=r"2 groups .* need a gate"):
        rms_norm(x, draw(4), groups=2)
