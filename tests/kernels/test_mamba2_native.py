"""Mamba-2's mixer in C++: bit-identity, memory, and the argument checks of its operators."""

from __future__ import annotations

import pytest
import torch
from helpers.layers import LENGTHS, assert_near, pack, value_and_gradients
from helpers.mamba2 import NAMES, Shape
from nemocascade_kernels import PackedSeq, native
from torch import Tensor

SHAPE = Shape(4, 5, 2, 7)


def of(
    inputs: list[Tensor],
    upstream: Tensor,
    packed: PackedSeq,
    shape: Shape = SHAPE,
    backend: str = "native",
) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    return value_and_gradients(lambda *i: shape.run(list(i), packed, backend), inputs, upstream)


def test_long_documents_make_their_states_again() -> None:
    """More chunks than backward holds states of, with a rest, beside a short document.

    A state that hardly decays sums thousands of rows: torch's float32 errs by 2e-5 here.
    """
    packed, shape = pack((4200, 5, 2048)), Shape(2, 4, 1, 4)
    inputs = shape.inputs(packed.total)
    inputs[4] = torch.tensor([-1e-4, -0.1]).double()
    upstream = shape.upstream(packed.total)
    ours = of([t.float() for t in inputs], upstream, packed, shape)
    assert_near(ours, of(inputs, upstream, packed, shape, "torch"), 4e-5, NAMES)


def test_bfloat16_is_no_worse_than_torch() -> None:
    packed, shape = pack(LENGTHS), Shape(6, 5, 3, 7)
    inputs = shape.inputs(packed.total, torch.bfloat16)
    upstream = shape.upstream(packed.total).bfloat16()
    best = of([t.double() for t in inputs], upstream.double(), packed, shape, "torch")
    theirs = of(inputs, upstream, packed, shape, "torch")
    mine = of(inputs, upstream, packed, shape)
    for name, a, b, c in zip(NAMES, mine, theirs, best, strict=True):
        assert a.dtype == torch.bfloat16
        error, their_error = ((t.double() - c).abs().max() for t in (a, b))
        assert error <= 1.05 * their_error + 1e-6 * c.abs().max(), name


def test_bits_do_not_depend_on_the_place_in_the_pack() -> None:
    lengths = (300, 77, 1, 400)
    packed = pack(lengths)
    inputs = SHAPE.inputs(packed.total, torch.float32)
    upstream = SHAPE.upstream(packed.total)
    together = of(inputs, upstream, packed)
    rows, rest = inputs[0].split(lengths), inputs[1:]
    for index, length in enumerate(lengths):
        alone = of([rows[index], *rest], upstream.split(lengths)[index], pack((length,)))
        for name, whole, part in zip(NAMES[:2], together, alone, strict=False):
            assert torch.equal(whole.split(lengths)[index], part), f"{name} of document {index}"


def test_bits_do_not_depend_on_the_threads() -> None:
    packed = pack((300, 77, 1, 900, 260))
    inputs = SHAPE.inputs(packed.total, torch.float32)
    upstream = SHAPE.upstream(packed.total)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(of(inputs, upstream, packed))
    finally:
        torch.set_num_threads(before)
    for name, one, *others in zip(NAMES, *found, strict=True):
        assert all(torch.equal(one, other) for other in others), name


def test_rows_may_be_strided() -> None:
    packed = pack((40, 3))
    inputs = SHAPE.inputs(packed.total, torch.float32)
    expected = SHAPE.run(inputs, packed, "native")
    wide = torch.nn.functional.pad(inputs[0], (3, 2), value=float("nan"))[:, 3:-2]
    columns = inputs[0].t().contiguous().t()
    for rows in (wide, columns):
        assert not rows.is_contiguous()
        assert torch.equal(SHAPE.run([rows, *inputs[1:]], packed, "native"), expected)


def test_operators_reject_what_would_read_outside() -> None:
    shape = Shape(2, 4, 1, 4)
    zxbcdt, *parameters = shape.inputs(3, torch.float32)
    joined = torch.cat([p.reshape(-1) for p in parameters])
    bounds, out = torch.tensor([0, 1, 3], dtype=torch.int32), zxbcdt.new_empty(3, 8)
    sizes = (2, 4, 1, 4, 4, 0.0, 1.0, 1e-5)
    no, conv, ssm = (None, None, None), torch.zeros(2, 3, 16), torch.zeros(2, 2, 4, 4)
    call = native.op("mamba2")
    call(zxbcdt, joined, bounds, *sizes, *no, out)
    call(zxbcdt, joined, bounds, *sizes, conv, ssm, ssm.clone(), out)
    for wrong, rule in (
        ((zxbcdt, joined, bounds + 1, *sizes, *no, out), "must begin with 0 and end with 3"),
        ((zxbcdt, joined, bounds[[0, 0, 2]], *sizes, *no, out), "document 0 has 0 rows"),
        ((zxbcdt, joined[1:], bounds, *sizes, *no, out), "parameters must be"),
        ((zxbcdt[:, 1:], joined, bounds, *sizes, *no, out), "zxbcdt must be"),
        ((zxbcdt, joined, bounds, *sizes, *no, out[:, 1:]), "out must be"),
        ((zxbcdt, joined, bounds, 3, 4, 2, *sizes[3:], *no, out), "multiple of groups"),
        ((zxbcdt, joined, bounds, *sizes, conv[1:], ssm, None, out), "initial_conv must be"),
        ((zxbcdt, joined, bounds, *sizes, conv, ssm[1:], None, out), "initial_ssm must be"),
        ((zxbcdt, joined, bounds, *sizes, None, None, ssm[1:], out), "final_ssm must be"),
    ):
        with pytest.raises(RuntimeError, match=rule):
            call(*wrong)
