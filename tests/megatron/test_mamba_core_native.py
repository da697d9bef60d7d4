"""The core of the Mamba-2 mixer in C++ against the same in torch's operators, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.layers import LENGTHS, assert_isolated, assert_near, draw, pack, value_and_gradients
from torch import Tensor

from nemocascade.megatron import native
from nemocascade.megatron.layers.mamba_core import CoreSizes, packed_mamba_core
from nemocascade.megatron.layers.mamba_native import OPERATORS, native_mamba_core, refusal
from nemocascade.megatron.layers.packing import PackedSeq

NAMES = ["out", "zxbcdt", "conv weight", "conv bias", "dt bias", "A", "D", "norm weight"]
FREE = (0.0, math.inf)
LEVELS = ["base", "v3", "v4"]


def sizes_of(
    heads: int, head_dim: int, groups: int, state: int, limit: tuple[float, float] = FREE
) -> CoreSizes:
    return CoreSizes(heads, head_dim, groups, state, limit, eps=1e-5)


def inputs_of(rows: int, sizes: CoreSizes, window: int = 4) -> list[Tensor]:
    """Float64, of numbers that float32 can hold."""
    tensors = [
        draw(rows, sizes.inner + sizes.channels + sizes.heads),
        draw(sizes.channels, window) / 2,
        draw(sizes.channels, seed=1) / 4,
        draw(sizes.heads) - 1,
        -draw(sizes.heads, seed=1).exp(),
        draw(sizes.heads, seed=2),
        draw(sizes.inner),
    ]
    return [t.double() for t in tensors]


def exact(
    inputs: list[Tensor], upstream: Tensor, packed: PackedSeq, sizes: CoreSizes
) -> list[Tensor]:
    return value_and_gradients(
        lambda *i: packed_mamba_core(*i, packed, sizes, impl="torch"), inputs, upstream
    )


def ours(
    inputs: list[Tensor],
    upstream: Tensor,
    packed: PackedSeq,
    sizes: CoreSizes,
    level: str = "",
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    return value_and_gradients(
        lambda *i: native_mamba_core(*i, packed, sizes, level),
        [t.to(dtype) for t in inputs],
        upstream.to(dtype),
    )


def skip_without(level: str) -> None:
    """Skip where this processor lacks the level."""
    sizes = sizes_of(1, 1, 1, 1)
    try:
        native_mamba_core(*(t.float() for t in inputs_of(1, sizes)), pack((1,)), sizes, level)
    except RuntimeError as error:
        if f"no level {level}" not in str(error):
            raise
        pytest.skip(f"this processor has no level {level}")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        (sizes_of(6, 5, 3, 7), 4),
        (sizes_of(4, 20, 1, 18, (0.05, 0.9)), 2),
        (sizes_of(3, 33, 3, 1), 3),
        (sizes_of(8, 32, 2, 32), 4),
        (sizes_of(2, 1, 1, 40), 1),
        (sizes_of(2, 16, 1, 16), 33),
    ],
)
def test_equals_torch_in_float64(sizes: CoreSizes, window: int, level: str) -> None:
    skip_without(level)
    packed = pack(LENGTHS)
    inputs = inputs_of(packed.total, sizes, window)
    upstream = draw(packed.total, sizes.inner, seed=9).double()
    assert_near(
        ours(inputs, upstream, packed, sizes, level),
        exact(inputs, upstream, packed, sizes),
        5e-6,
        NAMES,
    )


@pytest.mark.parametrize("scale", [1e-4, 8.0, 40.0])
def test_small_and_large_inputs(scale: float) -> None:
    """SiLU, softplus and the decays from their linear parts to where they saturate."""
    packed, sizes = pack((70, 33)), sizes_of(4, 8, 2, 8)
    inputs = inputs_of(packed.total, sizes)
    inputs[0] *= scale
    inputs[0] = inputs[0].float().double()
    upstream = draw(packed.total, sizes.inner, seed=9).double()
    assert_near(
        ours(inputs, upstream, packed, sizes), exact(inputs, upstream, packed, sizes), 1e-5, NAMES
    )


@pytest.mark.parametrize("rate", [0.0, 1e-6, 5.0, 37.0, 200.0, 1e4])
def test_keeps_every_decay(rate: float) -> None:
    """From no decay to one that clears the state at once, and both in one chunk."""
    packed, sizes = pack((70, 33)), sizes_of(4, 8, 2, 8)
    inputs = inputs_of(packed.total, sizes)
    inputs[0][:, -sizes.heads :] = 1.0
    inputs[0][::3, -sizes.heads :] = -8.0
    inputs[4] = torch.tensor([-rate, -1.0, -rate, -1.0]).double()
    upstream = draw(packed.total, sizes.inner, seed=9).double()
    assert_near(
        ours(inputs, upstream, packed, sizes), exact(inputs, upstream, packed, sizes), 1e-5, NAMES
    )


def test_long_documents_make_their_states_again() -> None:
    """More chunks than backward holds states of, with a tail, beside a short document.

    A state that hardly decays sums thousands of rows: torch's float32 errs by 2e-5 here.
    """
    packed, sizes = pack((4200, 5, 2048)), sizes_of(2, 4, 1, 4)
    inputs = inputs_of(packed.total, sizes)
    inputs[4] = torch.tensor([-1e-4, -0.1]).double()
    upstream = draw(packed.total, sizes.inner, seed=9).double()
    assert_near(
        ours(inputs, upstream, packed, sizes), exact(inputs, upstream, packed, sizes), 4e-5, NAMES
    )


def test_bfloat16_is_no_worse_than_torch() -> None:
    packed, sizes = pack(LENGTHS), sizes_of(6, 5, 3, 7)
    inputs = [t.bfloat16() for t in inputs_of(packed.total, sizes)]
    upstream = draw(packed.total, sizes.inner, seed=9).bfloat16()
    best = exact([t.double() for t in inputs], upstream.double(), packed, sizes)
    theirs = exact(inputs, upstream, packed, sizes)
    mine = ours(inputs, upstream, packed, sizes, dtype=torch.bfloat16)
    for name, a, b, c in zip(NAMES, mine, theirs, best, strict=True):
        assert a.dtype == torch.bfloat16
        error, their_error = ((t.double() - c).abs().max() for t in (a, b))
        assert error <= 1.05 * their_error + 1e-6 * c.abs().max(), name


@pytest.mark.parametrize("level", LEVELS)
def test_documents_are_isolated(level: str) -> None:
    skip_without(level)
    packed, sizes = pack((33, 1, 70, 2)), sizes_of(4, 5, 2, 7)
    _, *rest = (t.float() for t in inputs_of(1, sizes))
    assert_isolated(
        lambda rows, p: native_mamba_core(rows, *rest, p, sizes, level),
        [inputs_of(packed.total, sizes)[0].float()],
        packed,
    )


def test_bits_do_not_depend_on_the_place_in_the_pack() -> None:
    sizes = sizes_of(4, 5, 2, 7)
    lengths = (300, 77, 1, 400)
    packed = pack(lengths)
    inputs = inputs_of(packed.total, sizes)
    upstream = draw(packed.total, sizes.inner, seed=9)
    together = ours(inputs, upstream, packed, sizes)
    rows, rest = inputs[0].split(lengths), inputs[1:]
    for index, length in enumerate(lengths):
        alone = ours([rows[index], *rest], upstream.split(lengths)[index], pack((length,)), sizes)
        for name, whole, part in zip(NAMES[:2], together, alone, strict=False):
            assert torch.equal(whole.split(lengths)[index], part), f"{name} of document {index}"


def test_bits_do_not_depend_on_the_threads() -> None:
    packed, sizes = pack((300, 77, 1, 900, 260)), sizes_of(4, 5, 2, 7)
    inputs = inputs_of(packed.total, sizes)
    upstream = draw(packed.total, sizes.inner, seed=9)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ours(inputs, upstream, packed, sizes))
    finally:
        torch.set_num_threads(before)
    for name, one, *others in zip(NAMES, *found, strict=True):
        assert all(torch.equal(one, other) for other in others), name


def test_rows_may_be_strided() -> None:
    packed, sizes = pack((40, 3)), sizes_of(4, 5, 2, 7)
    inputs = [t.float() for t in inputs_of(packed.total, sizes)]
    expected = native_mamba_core(*inputs, packed, sizes)
    wide = torch.nn.functional.pad(inputs[0], (3, 2), value=float("nan"))[:, 3:-2]
    columns = inputs[0].t().contiguous().t()
    for rows in (wide, columns):
        assert not rows.is_contiguous()
        assert torch.equal(native_mamba_core(rows, *inputs[1:], packed, sizes), expected)


def test_which_core_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, sizes = pack((3,)), sizes_of(2, 4, 1, 4)
    inputs = inputs_of(3, sizes)
    assert refusal(inputs[0].float()) is None, "the library must be built for the tests"
    assert refusal(inputs[0].bfloat16()) is None
    assert "torch.float64" in str(refusal(inputs[0]))
    assert "torch.float16" in str(refusal(inputs[0].half()))
    with pytest.raises(ValueError, match="takes float32 and bfloat16"):
        packed_mamba_core(*inputs, packed, sizes, impl="native")
    single = [t.float() for t in inputs]
    chosen = packed_mamba_core(*single, packed, sizes)
    assert torch.equal(chosen, packed_mamba_core(*single, packed, sizes, impl="native"))
    by_torch = packed_mamba_core(*single, packed, sizes, impl="torch")
    monkeypatch.setattr(native, "lacks", lambda *_names: "not built")
    assert torch.equal(packed_mamba_core(*single, packed, sizes), by_torch)
    with pytest.raises(ValueError, match="not built"):
        packed_mamba_core(*single, packed, sizes, impl="native")


def test_operators_refuse_what_would_read_outside() -> None:
    sizes = sizes_of(2, 4, 1, 4)
    zxbcdt, *parameters = (t.float() for t in inputs_of(3, sizes))
    joined = torch.cat([p.reshape(-1) for p in parameters])
    bounds, out = torch.tensor([0, 1, 3], dtype=torch.int32), zxbcdt.new_empty(3, 8)
    settings = (2, 4, 1, 4, 4, 0.0, 1.0, 1e-5, "")
    call = native.op(OPERATORS[0])
    call(zxbcdt, joined, bounds, *settings, out)
    for wrong, rule in (
        ((zxbcdt, joined, bounds + 1, *settings, out), "must begin with 0 and end with 3"),
        ((zxbcdt, joined, bounds[[0, 0, 2]], *settings, out), "document 0 has 0 rows"),
        ((zxbcdt, joined[1:], bounds, *settings, out), "parameters must be"),
        ((zxbcdt[:, 1:], joined, bounds, *settings, out), "zxbcdt must be"),
        ((zxbcdt, joined, bounds, *settings, out[:, 1:]), "out must be"),
        ((zxbcdt, joined, bounds, 3, *settings[1:2], 2, *settings[3:], out), "multiple of groups"),
        ((zxbcdt, joined, bounds, *settings[:-1], "v9", out), "no level v9"),
    ):
        with pytest.raises(RuntimeError, match=rule):
            call(*wrong)
