# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
"""The accelerated interpreter computes what Triton's own does, and undoes its changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.interpreter import TRITON, accelerate
from nemocascade_kernels.backends import interpreting

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (interpreting() and triton.__version__.startswith(TRITON)),
    reason=f"for the interpreter of Triton {TRITON}x",
)


@triton.jit
def _halved(x):
    return x.to(tl.float32) * 0.5


@triton.jit
def _values(x, y, sizes, out, kept, SIZE: tl.constexpr):
    """A function, a tuple, integers that wrap, and broadcasting in every way: of a scalar, of
    columns and rows, of another rank, and of pointers."""
    rows, columns = tl.arange(0, SIZE), tl.arange(0, 2 * SIZE)
    mask = (rows < sizes[0])[:, None] & (columns < sizes[1])
    at = rows[:, None] * sizes[1] + columns[None, :]
    loaded = tl.load(x + at, mask=mask, other=3)
    wrapped = loaded * 65_536 + 2_147_483_647
    tl.store(out + at, wrapped + tl.sum(loaded, 1)[:, None] - sizes[0], mask=mask)
    tl.store(kept + columns, _halved(tl.load(y + columns)), mask=columns < sizes[1])


def test_results_have_every_bit() -> None:
    assert accelerate()
    x = torch.randint(-(2**31), 2**31, (3, 7), dtype=torch.int32)
    y, kept = torch.randn(8).bfloat16(), torch.full((8,), 9.0)
    out = torch.zeros_like(x)
    _values[(1,)](x, y, (3, 7), out, kept, SIZE=4)
    sums = torch.nn.functional.pad(x, (0, 1), value=3).sum(1, keepdim=True)
    exact = x.long() * 65_536 + 2_147_483_647 + sums - 3
    assert torch.equal(out, exact.to(torch.int32))
    assert torch.equal(kept[:7], y[:7].float() / 2)
    assert kept[7] == 9.0


def test_conversions_have_every_bit() -> None:
    """Against the interpreter's own: of every number of 16 bits, and of random ones of 32."""
    from triton.runtime import interpreter

    assert accelerate()
    fast: Any = interpreter._convert_float
    own = fast.__closure__[fast.__code__.co_freevars.index("convert")].cell_contents
    small = np.arange(2**16, dtype=np.uint16).reshape(256, 256).T
    for target in (tl.float32, tl.float16):
        args = tl.bfloat16, target, None
        assert (fast(small, *args) == own(small, *args)).all()
    bits = np.random.default_rng(0).integers(0, 2**32, 2**14, dtype=np.uint32)
    normal = bits[(bits & 0x7F800000) != 0]
    for values in (bits, normal, np.array([0, 1, 2**31], np.uint32), normal[:0]):
        for mode in (None, interpreter._ir.ROUNDING_MODE.RTNE):
            given = values.view(np.float32), tl.float32, tl.bfloat16, mode
            assert (fast(*given) == own(*given)).all()


@triton.jit
def _misfit(SIZE: tl.constexpr):
    tl.arange(0, SIZE)[:, None] + tl.arange(0, SIZE)[:, None] * tl.arange(0, 2 * SIZE)[None, :]
    tl.arange(0, SIZE) + tl.arange(0, 2 * SIZE)


def test_shapes_that_do_not_fit_are_errors() -> None:
    assert accelerate()
    with pytest.raises(Exception, match="incompatible dimensions at index 0: 4 and 8"):
        _misfit[(1,)](SIZE=4)


def test_the_language_is_restored_after_launches_and_errors() -> None:
    assert accelerate()
    owners: list[Any] = [tl, tl.core, tl.math, tl.tensor, tl.dtype]
    before = [dict(vars(owner)) for owner in owners]
    test_results_have_every_bit()
    with pytest.raises(Exception, match="incompatible"):
        _misfit[(1,)](SIZE=4)
    assert [dict(vars(owner)) for owner in owners] == before
    with pytest.raises(ValueError, match=r"@triton\.jit"):
        tl.arange(0, 4)
