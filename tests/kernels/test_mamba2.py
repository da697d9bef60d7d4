"""Mamba-2's mixer: every implementation against the recurrence, in float64; initial and final
states."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers.layers import (
    LENGTHS,
    assert_isolated,
    assert_near,
    assert_packed_equals_alone,
    draw,
    pack,
    value_and_gradients,
)
from helpers.mamba2 import NAMES, Shape
from nemocascade_kernels import MambaWeights, PackedSeq, mamba2, mamba2_final_state, step_mamba
from nemocascade_kernels.backends import BackendUnavailableError
from nemocascade_kernels.mamba2 import ssd
from nemocascade_kernels.mamba2.op import OP
from nemocascade_kernels.testing import PoisonedMemory
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SMALL = Shape(6, 5, 3, 7)
SHAPES = [
    SMALL,
    Shape(6, 5, 3, 7, window=7),
    Shape(4, 20, 1, 18, 2, (0.05, 0.9)),
    Shape(3, 33, 3, 1, 3),
    Shape(8, 32, 2, 32),
    Shape(2, 1, 1, 40, 1),
    Shape(2, 16, 1, 16, 33, (0.1, 0.8)),
]
# Errors, of the largest value.
KINDS = [
    ("torch", torch.float64, 1e-13),
    ("torch", torch.float32, 1e-5),
    ("torch", torch.bfloat16, 2e-2),
    ("native", torch.float32, 5e-6),
    ("native", torch.bfloat16, 2e-2),
    ("reference", torch.float32, 1e-5),
    ("reference", torch.bfloat16, 2e-2),
]
COMPILED_AND_TORCH = pytest.mark.parametrize("backend", ["native", "torch"])


def of(
    inputs: Sequence[Tensor], upstream: Tensor, packed: PackedSeq, shape: Shape, backend: str
) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    with PoisonedMemory():
        return value_and_gradients(lambda *i: shape.run(list(i), packed, backend), inputs, upstream)


@functools.cache
def exact_of(shape: Shape, lengths: tuple[int, ...], rounded: bool) -> list[Tensor]:
    """The reference in float64. rounded: inputs are bfloat16's numbers."""
    packed = pack(lengths)
    inputs = shape.inputs(packed.total)
    if rounded:
        inputs = [t.bfloat16().double() for t in inputs]
    return of(inputs, shape.upstream(packed.total), packed, shape, "reference")


#: The compiled kernels have code paths for sizes; torch's operators have few, and the definition in
#: lower precision has one: two shapes, of which the last has the widest window.
QUICK = [
    (shape, *kind)
    for place, shape in enumerate(SHAPES)
    for kind in KINDS
    if kind[0] == "native" or kind[1] == torch.float64 or place in (0, len(SHAPES) - 1)
]


@pytest.mark.parametrize(("shape", "backend", "dtype", "tolerance"), QUICK)
def test_equals_the_recurrence(
    shape: Shape, backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Documents below the window and a chunk of 32, of whole chunks, and one row longer; the state
    passes three of them."""
    assert_recurrence(shape, (1, 2, 37, 64, 97, 3), backend, dtype, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_equals_the_recurrence(
    shape: Shape, backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    assert_recurrence(shape, LENGTHS, backend, dtype, tolerance)


def assert_recurrence(
    shape: Shape, lengths: tuple[int, ...], backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    packed = pack(lengths)
    inputs = shape.inputs(packed.total, dtype)
    ours = of(inputs, shape.upstream(packed.total), packed, shape, backend)
    exact = exact_of(shape, lengths, dtype == torch.bfloat16)
    assert_near(ours, exact, tolerance, NAMES)
    assert [t.dtype for t in ours] == [dtype] * len(NAMES)


#: Several segments of two chunks, of which some follow chunks that are not a range, and a segment
#: of eight; decays from one that lasts through a segment to one that clears a chunk.
SEGMENTED = Shape(4, 8, 2, 8), (1, 130, 40, 300, 70), (-1e-4, -0.1, -2.0, -200.0)


def segmented_inputs() -> list[Tensor]:
    shape, lengths, decays = SEGMENTED
    inputs = shape.inputs(sum(lengths))
    inputs[4] = torch.tensor(decays).double()
    return inputs


@pytest.fixture(scope="module")
def exact_segments() -> list[Tensor]:
    shape, lengths, _ = SEGMENTED
    inputs, packed = segmented_inputs(), pack(lengths)
    return of(inputs, shape.upstream(packed.total), packed, shape, "reference")


@pytest.mark.parametrize("widest", [2, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_segments_equal_the_recurrence(
    widest: int,
    dtype: torch.dtype,
    tolerance: float,
    exact_segments: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several chunks a step, as on a GPU."""
    monkeypatch.setitem(ssd._SEGMENT, "cpu", widest)
    shape, lengths, _ = SEGMENTED
    packed = pack(lengths)
    inputs = [t.to(dtype) for t in segmented_inputs()]
    ours = of(inputs, shape.upstream(packed.total), packed, shape, "torch")
    assert_near(ours, exact_segments, tolerance, NAMES)


def test_documents_in_segments_are_isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ssd._SEGMENT, "cpu", 4)
    packed = pack((300, 5, 200))
    rows = SMALL.inputs(packed.total, torch.float32)[:1]
    assert_isolated(of_rows(SMALL, "torch", torch.float32), rows, packed)


@COMPILED_AND_TORCH
@pytest.mark.parametrize("rate", [0.0, 1e-6, 5.0, 37.0, 200.0, 1e4])
def test_keeps_every_decay(rate: float, backend: str) -> None:
    """From no decay to one that clears the state at once, and both in one chunk."""
    packed, shape = pack((70, 33)), Shape(4, 8, 2, 8)
    inputs = shape.inputs(packed.total)
    inputs[0][:, -shape.heads :] = 1.0
    inputs[0][::3, -shape.heads :] = -8.0
    inputs[4] = torch.tensor([-rate, -1.0, -rate, -1.0]).double()
    upstream = shape.upstream(packed.total)
    ours = of([t.float() for t in inputs], upstream, packed, shape, backend)
    assert_near(ours, of(inputs, upstream, packed, shape, "reference"), 1e-5, NAMES)


@COMPILED_AND_TORCH
@pytest.mark.parametrize("scale", [1e-4, 8.0, 40.0])
def test_small_and_large_inputs(scale: float, backend: str) -> None:
    """SiLU, softplus and the decays from their linear parts to where they saturate."""
    packed, shape = pack((70, 33)), Shape(4, 8, 2, 8)
    inputs = shape.inputs(packed.total)
    inputs[0] = (inputs[0] * scale).float().double()
    upstream = shape.upstream(packed.total)
    ours = of([t.float() for t in inputs], upstream, packed, shape, backend)
    assert_near(ours, of(inputs, upstream, packed, shape, "reference"), 1e-5, NAMES)


def of_rows(shape: Shape, backend: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function of zxbcdt and its pack alone."""
    _, *rest = shape.inputs(1, dtype)
    return lambda zxbcdt, packed: shape.run([zxbcdt, *rest], packed, backend)


@COMPILED_AND_TORCH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_are_isolated(backend: str, dtype: torch.dtype) -> None:
    packed = pack((1, 2, 37, 64, 65, 3))
    rows = SMALL.inputs(packed.total, dtype)[:1]
    assert_isolated(of_rows(SMALL, backend, dtype), rows, packed)


@COMPILED_AND_TORCH
def test_packed_equals_one_at_a_time(backend: str) -> None:
    packed = pack(LENGTHS)
    rows = SMALL.inputs(packed.total, torch.float32)[:1]
    assert_packed_equals_alone(of_rows(SMALL, backend, torch.float32), rows, packed, 1e-5)


@COMPILED_AND_TORCH
def test_a_document_of_zeros_gives_zero(backend: str) -> None:
    packed = pack((3, 40))
    inputs = SMALL.inputs(43, torch.float32)
    inputs[0][3:] = 0
    inputs[2].zero_()
    out = SMALL.run(inputs, packed, backend)
    assert bool((out[3:] == 0).all())
    assert bool((out[:3] != 0).any())


@COMPILED_AND_TORCH
def test_rows_past_two_to_the_31_elements(backend: str) -> None:
    """Rows are so far apart in memory that the last ones lie beyond 2^31 elements.

    The memory between them is never touched, so the operating system never provides it.
    """
    packed = pack((37, 1, 90, 72))
    dense, *rest = SMALL.inputs(packed.total, torch.float32)
    gap = 2**31 // (packed.total - 20)
    apart = torch.empty(packed.total * gap).as_strided(dense.shape, (gap, 1))
    apart.copy_(dense)
    assert (packed.total - 1) * gap > 2**31
    expected = SMALL.run([dense, *rest], packed, backend)
    assert torch.equal(SMALL.run([apart, *rest], packed, backend), expected)


@COMPILED_AND_TORCH
@pytest.mark.parametrize("lengths", [(262_144,), (200_000, 1, 5, 62_138)])
def test_a_sequence_of_262144_tokens(lengths: tuple[int, ...], backend: str) -> None:
    packed, shape = pack(lengths), Shape(2, 4, 1, 4, window=1)
    zxbcdt, *rest = shape.inputs(packed.total, torch.float32)
    # The slow head remembers the whole document, the fast one only its last rows.
    rest[3] = torch.tensor([-1e-5, -0.5])
    zxbcdt.requires_grad_()
    out = shape.run([zxbcdt, *rest], packed, backend)
    out[-3000:].square().sum().backward()
    assert zxbcdt.grad is not None
    start = int(packed.starts[-1])
    first = zxbcdt.grad[start]
    assert bool(zxbcdt.grad.isfinite().all())
    assert float(first[8:12].abs().max()) > 0, "the gradient reaches the first x of the slow head"
    if start:
        assert bool((zxbcdt.grad[:start] == 0).all()), "a gradient reached another document"

    with torch.no_grad():
        final = mamba2(
            zxbcdt, *rest, packed, **shape.settings, return_final_state=True, backend=backend
        )[1]
    assert final is not None
    weight, bias, dt_bias, A = (t.double() for t in rest[:4])
    _, xbc, dt = zxbcdt.detach()[start:].double().split([8, 16, 2], 1)
    x, b, c = torch.nn.functional.silu(xbc * weight[:, 0] + bias).split([8, 4, 4], 1)
    step = torch.nn.functional.softplus(dt + dt_bias)
    after = (step * A).flip(0).cumsum(0).flip(0) - step * A
    state = torch.einsum("th,thp,tn->hpn", after.exp() * step, x.unflatten(1, (2, 4)), b)
    torch.testing.assert_close(final[1][-1].double(), state, rtol=1e-3, atol=1e-2)
    D, norm_weight = (t.double() for t in rest[4:])
    y = torch.einsum("n,hpn->hp", c[-1], state) + D[:, None] * x[-1].unflatten(0, (2, 4))
    u = y.flatten() * torch.nn.functional.silu(zxbcdt.detach()[-1, :8].double())
    last = u / torch.sqrt(u.square().mean() + 1e-5) * norm_weight
    torch.testing.assert_close(out[-1].detach().double(), last, rtol=1e-3, atol=1e-2)


def in_pieces(
    inputs: list[Tensor], lengths: Sequence[int], shape: Shape, size: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and final states of documents that are read `size` rows a call; short ones end before
    long ones, and the first begins beside others that continue."""
    rows = inputs[0].split(list(lengths))
    outs: list[list[Tensor]] = [[] for _ in lengths]
    states: dict[int, tuple[Tensor, Tensor]] = {}
    done = [0] * len(lengths)
    late = True
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        turn = [i for i, n in enumerate(lengths) if done[i] < n and not (late and i == 0)]
        late = False
        pieces = [rows[i][done[i] : done[i] + size] for i in turn]
        conv = inputs[0].new_zeros(len(turn), shape.window - 1, shape.channels)
        ssm = torch.zeros(len(turn), shape.heads, shape.head_dim, shape.state)
        ssm = ssm.to(torch.promote_types(inputs[0].dtype, torch.float32))
        for place, i in enumerate(turn):
            if i in states:
                conv[place], ssm[place] = states[i]
        cu = torch.tensor([0, *(len(p) for p in pieces)]).cumsum(0).int()
        out, final = mamba2(
            torch.cat(pieces), *inputs[1:], cu, **shape.settings,
            initial_state=(conv, ssm) if states else None,
            return_final_state=True, backend=backend,
        )  # fmt: skip
        assert final is not None
        for place, (i, part) in enumerate(
            zip(turn, out.split([len(p) for p in pieces]), strict=True)
        ):
            outs[i].append(part)
            states[i] = final[0][place], final[1][place]
            done[i] += len(part)
    found = [states[i] for i in range(len(lengths))]
    return (
        torch.cat([part for parts in outs for part in parts]),
        torch.stack([conv for conv, _ in found]),
        torch.stack([ssm for _, ssm in found]),
    )


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("reference", torch.float64, 1e-13),
        ("torch", torch.float64, 1e-13),
        ("torch", torch.float32, 1e-5),
        ("native", torch.float32, 1e-5),
        ("native", torch.bfloat16, 2e-2),
    ],
)
@pytest.mark.parametrize(
    "shape", [SMALL, Shape(6, 3, 6, 5, 2), Shape(8, 32, 2, 32), Shape(2, 4, 1, 3, 9)]
)
def test_pieces_equal_the_whole(
    shape: Shape, backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    """At sizes below the convolution's window, around the chunks, and odd ones."""
    lengths = (67, 1, 3, 33)
    packed = pack(lengths)
    inputs = shape.inputs(packed.total, dtype)
    whole, final = mamba2(
        *(t.double() for t in inputs), packed, **shape.settings,
        return_final_state=True, backend="reference",
    )  # fmt: skip
    assert final is not None
    for size in (1, 7, 32, 45, 68):
        found = in_pieces(inputs, lengths, shape, size, backend)
        assert_near(found, (whole, *final), tolerance, ["out", "conv", "ssm"])
        assert torch.equal(found[1].double(), final[0]), "the last inputs are copies"


def test_one_row_at_a_time_equals_the_decode_step() -> None:
    """The two definitions, of a text and of a token, agree."""
    shape = Shape(4, 5, 2, 3, 4, (0.05, 0.9))
    inputs = shape.inputs(12)
    whole = shape.run(inputs, pack((12,)), "reference")
    conv = torch.zeros(1, shape.window - 1, shape.channels, dtype=torch.float64)
    ssm = torch.zeros(1, shape.heads, shape.head_dim, shape.state, dtype=torch.float64)
    weights = MambaWeights(*inputs[1:], shape.groups, shape.dt_limit, 1e-5)
    slots = torch.zeros(1, dtype=torch.int64)
    rows = [
        step_mamba(row[None], conv, ssm, slots, weights, backend="reference") for row in inputs[0]
    ]
    torch.testing.assert_close(torch.cat(rows), whole, rtol=1e-12, atol=1e-12)


def test_the_reference_differentiates_states() -> None:
    """A text in two pieces has the gradients of the whole."""
    shape, packed = Shape(2, 3, 1, 2), pack((9,))
    inputs = shape.inputs(9)
    upstream = shape.upstream(9)

    def halves(zxbcdt: Tensor, *rest: Tensor) -> Tensor:
        first, states = mamba2(
            zxbcdt[:4], *rest, torch.tensor([0, 4]), **shape.settings,
            return_final_state=True, backend="reference",
        )  # fmt: skip
        second, none = mamba2(
            zxbcdt[4:], *rest, torch.tensor([0, 5]), **shape.settings,
            initial_state=states, backend="reference",
        )  # fmt: skip
        assert none is None
        return torch.cat([first, second])

    whole = of(inputs, upstream, packed, shape, "reference")
    assert_near(value_and_gradients(halves, inputs, upstream), whole, 1e-12, NAMES)


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("torch", torch.float64, 1e-13), (None, torch.float32, 1e-5)],
)
@pytest.mark.parametrize("documents", [None, (1, 3)])
def test_gradients_with_states(
    backend: str | None, dtype: torch.dtype, tolerance: float, documents: tuple[int, ...] | None
) -> None:
    """Gradients of the inputs and initial states equal those of the recurrence."""
    shape, packed = Shape(4, 5, 2, 3, 4, (0.05, 0.9)), pack((2, 67, 1, 33, 1))
    count = packed.num_documents if documents is None else len(documents)
    conv = draw(count, shape.window - 1, shape.channels).double()
    ssm = draw(count, shape.heads, shape.head_dim, shape.state).double()
    inputs = [*shape.inputs(packed.total), conv, ssm]
    weight = draw(packed.num_documents, shape.heads, shape.head_dim, shape.state, seed=4)

    def run(backend: str | None, *tensors: Tensor) -> Tensor:
        out, final = mamba2(
            *tensors[:7], packed, **shape.settings,
            initial_state=(tensors[7], tensors[8]), state_documents=documents,
            return_final_state=True, backend=backend,
        )  # fmt: skip
        assert final is not None
        return torch.cat([out.flatten(), (final[1] * weight.to(out.dtype)).flatten()])

    upstream = draw(packed.total * shape.inner + weight.numel(), seed=9)
    expected = value_and_gradients(functools.partial(run, "reference"), inputs, upstream)
    own = [t.to(dtype) for t in inputs]
    found = value_and_gradients(functools.partial(run, backend), own, upstream)
    assert_near(found, expected, tolerance, [*NAMES, "conv", "ssm"])


@torch.no_grad()
def test_final_states_that_nobody_reads_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, packed = Shape(4, 5, 2, 3, 4, (0.05, 0.9)), pack((2, 67, 1, 33, 1))
    conv = draw(2, shape.window - 1, shape.channels).double()
    ssm = draw(2, shape.heads, shape.head_dim, shape.state).double()
    inputs = shape.inputs(packed.total)

    def run(backend: str) -> Tensor:
        return mamba2(
            *inputs, packed, **shape.settings,
            initial_state=(conv, ssm), state_documents=(1, 3), backend=backend,
        )[0]  # fmt: skip

    expected = run("reference")
    monkeypatch.delattr(sys.modules["nemocascade_kernels.mamba2.states"], "final_states")
    assert_near([run("torch")], [expected], 1e-13, ["y"])


def test_only_native_has_no_gradient_with_states() -> None:
    inputs = SMALL.inputs(3, torch.float32)
    inputs[0].requires_grad_()
    with pytest.raises(ValueError, match=r"no gradient in backend .*torch\.no_grad"):
        mamba2(*inputs, pack((3,)), **SMALL.settings, return_final_state=True, backend="native")


def test_a_final_state_without_an_output() -> None:
    """`mamba2_final_state` and an initial state give the final state of `mamba2`."""
    shape, packed = Shape(4, 5, 2, 3, 4, (0.05, 0.9)), pack((2, 67, 1, 33))
    conv = draw(4, shape.window - 1, shape.channels).double()
    ssm = draw(4, shape.heads, shape.head_dim, shape.state).double()
    inputs = [*shape.inputs(packed.total), conv, ssm]

    def whole(*tensors: Tensor) -> Tensor:
        _, final = mamba2(
            *tensors[:7], packed, **shape.settings,
            initial_state=(tensors[7], tensors[8]), return_final_state=True, backend="reference",
        )  # fmt: skip
        assert final is not None
        return final[1]

    def alone(*tensors: Tensor) -> Tensor:
        state, decay = mamba2_final_state(
            *tensors[:5], packed, **shape.settings, initial_conv=tensors[7]
        )
        unused = (tensors[5].sum() + tensors[6].sum()) * 0
        return state + decay[:, :, None, None] * tensors[8] + unused

    upstream = draw(*ssm.shape, seed=9)
    expected = value_and_gradients(
        lambda *t: whole(*t) + (t[5].sum() + t[6].sum()) * 0, inputs, upstream
    )
    found = value_and_gradients(alone, inputs, upstream)
    kept = [k for k in range(len(found)) if k not in (6, 7)]
    names = [*NAMES, "conv", "ssm"]
    assert_near(
        [found[k] for k in kept], [expected[k] for k in kept], 1e-13, [names[k] for k in kept]
    )


@pytest.mark.parametrize("what", ["initial states", "final states", "state alone"])
def test_recomputation_around_the_mixer_keeps_none_of_its_inputs(what: str) -> None:
    """Between the passes, a checkpoint keeps its own input: the projection's output is freed."""
    shape, packed = Shape(4, 5, 2, 3), pack((2, 67))
    inputs = [t.requires_grad_() for t in shape.inputs(packed.total)]
    ssm = torch.zeros(2, shape.heads, shape.head_dim, shape.state, dtype=torch.float64)
    conv = torch.zeros(2, shape.window - 1, shape.channels, dtype=torch.float64)
    inside: list[weakref.ref[Tensor]] = []

    def layer(hidden: Tensor) -> Tensor:
        made = [hidden * 2, conv + 1, ssm + 1]
        inside.extend(map(weakref.ref, made))
        if what == "state alone":
            return mamba2_final_state(
                made[0], *inputs[1:5], packed, **shape.settings, initial_conv=made[1]
            )[0]
        return mamba2(
            made[0], *inputs[1:], packed, **shape.settings, backend="torch",
            initial_state=(made[1], made[2]) if what == "initial states" else None,
            return_final_state=what == "final states",
        )[0]  # fmt: skip

    out = checkpoint(layer, inputs[0], use_reentrant=False)
    assert [made() for made in inside] == [None] * 3
    out.sum().backward()
    assert len(inside) == 6
    assert inputs[0].grad is not None


def test_a_caller_that_recomputes_saves_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a checkpoint, `recompute=False` scans twice instead of three times; the same values."""
    shape, packed = Shape(4, 5, 2, 3), pack((2, 67))
    # States may have gaps between heads.
    ssm = draw(2, shape.heads, shape.head_dim * shape.state + 1)[:, :, 1:].double()
    ssm = ssm.view(2, shape.heads, shape.head_dim, shape.state)
    conv = draw(2, shape.window - 1, shape.channels).double()
    inputs, upstream = [*shape.inputs(packed.total), conv, ssm], shape.upstream(packed.total)
    module: Any = OP.module("torch")
    scan_forward, calls = module.scan_forward, []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return scan_forward(*args)

    monkeypatch.setattr(module, "scan_forward", counted)

    def layer(recompute: bool, *tensors: Tensor) -> Tensor:
        out, _ = mamba2(
            *tensors[:7], packed, **shape.settings,
            initial_state=(tensors[7], tensors[8]), recompute=recompute, backend="torch",
        )  # fmt: skip
        # Like a projection: its backward needs the mixer's output.
        return out.sin()

    def outer(recompute: bool, *tensors: Tensor) -> Tensor:
        out: Tensor = checkpoint(layer, recompute, *tensors, use_reentrant=False)
        return out

    results, counts = [], []
    for recompute in (True, False):
        calls.clear()
        run = functools.partial(outer, recompute)
        results.append(value_and_gradients(run, inputs, upstream))
        counts.append(len(calls))
    assert counts == [3, 2]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, shape = pack((3,)), Shape(2, 4, 1, 4)
    inputs = shape.inputs(3)
    single = [t.float() for t in inputs]
    assert OP.chosen(single[0]) == OP.chosen(single[0].bfloat16()) == "native", "build it first"
    assert OP.chosen(inputs[0]) == OP.chosen(inputs[0].half()) == "torch"
    with pytest.raises(BackendUnavailableError, match=r"got torch\.float64"):
        shape.run(inputs, packed, "native")
    with pytest.raises(BackendUnavailableError, match="fla"):
        shape.run(single, packed, "fla")
    compiled = shape.run(single, packed, "native")
    assert torch.equal(shape.run(single, packed, None), compiled)
    by_torch = shape.run(single, packed, "torch")
    monkeypatch.setattr("nemocascade_kernels.native.missing", lambda *_names: "not built")
    assert torch.equal(shape.run(single, packed, None), by_torch)
    with pytest.raises(BackendUnavailableError, match="not built"):
        shape.run(single, packed, "native")


def test_documents_by_a_tensor_or_a_description() -> None:
    inputs = SMALL.inputs(43, torch.float32)
    expected = SMALL.run(inputs, pack((3, 40)), None)
    cu_seqlens = torch.tensor([0, 3, 43], dtype=torch.int32)
    assert torch.equal(mamba2(*inputs, cu_seqlens, **SMALL.settings)[0], expected)


@pytest.mark.parametrize(
    ("index", "change", "rule"),
    [
        (0, lambda t: t[1:], "3 rows, the packed microbatch has 4"),
        (0, lambda t: t[:, 1:], r"zxbcdt is \[4, 107\], not \[4, 108\]"),
        (0, lambda t: t[0], "must be matrices"),
        (1, lambda t: t[1:], r"conv_weight is \[71, 4\], not \[72, 4\]"),
        (
            1,
            lambda t: t.new_zeros(72, 34),
            "over 34 rows reaches beyond a chunk of 32: use at most 33",
        ),
        (3, lambda t: t[1:], r"dt_bias is \[5\], not \[6\]"),
        (5, lambda t: t[1:], r"D is \[5\], not \[6\]"),
        (6, lambda t: t[1:], r"norm_weight is \[29\], not \[30\]"),
    ],
)
def test_wrong_shapes_are_named(index: int, change: Callable[[Tensor], Tensor], rule: str) -> None:
    inputs = SMALL.inputs(4)
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=rule):
        SMALL.run(inputs, pack((1, 3)), None)


def test_wrong_states_and_sizes_are_named() -> None:
    inputs, packed = SMALL.inputs(4), pack((1, 3))
    conv, ssm = draw(2, 3, SMALL.channels), draw(1, 6, 5, 7)
    with pytest.raises(
        ValueError, match=r"initial_state\[1\] is \[1, 6, 5, 7\], not \[2, 6, 5, 7\]"
    ):
        mamba2(*inputs, packed, **SMALL.settings, initial_state=(conv, ssm))
    with pytest.raises(ValueError, match="6 heads cannot share 4 groups equally"):
        mamba2(*inputs, packed, **(SMALL.settings | {"groups": 4}))
