"""The state-space scan, the convolution and the fused core of the Mamba-2 mixer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import (
    LENGTHS,
    assert_isolated,
    assert_near,
    assert_packed_equals_alone,
    documents,
    draw,
    pack,
    value_and_gradients,
)
from torch import Tensor

from nemocascade.megatron.layers.conv import packed_causal_conv1d
from nemocascade.megatron.layers.mamba_core import CoreSizes, packed_mamba_core
from nemocascade.megatron.layers.norm import gated_rms_norm
from nemocascade.megatron.layers.packing import PackedSeq
from nemocascade.megatron.layers.ssm import packed_ssd_scan

SCAN = ["y", "dx", "d_dt", "dA", "dB", "dC", "dD"]
H, P, G, N = 6, 5, 3, 7


def scan_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, packed: PackedSeq
) -> Tensor:
    """The recurrence of `ssm`, token by token."""
    ratio = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(ratio, 1), C.repeat_interleave(ratio, 1)
    out = []
    for document in documents(packed):
        state = x.new_zeros(x.shape[1], B.shape[2], x.shape[2])
        for t in range(document.start, document.stop):
            kept = torch.exp(dt[t] * A)[:, None, None] * state
            state = kept + dt[t][:, None, None] * B[t][:, :, None] * x[t][:, None, :]
            out.append((C[t][:, :, None] * state).sum(1) + D[:, None] * x[t])
    return torch.stack(out)


def scan_inputs(rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        t.to(dtype)
        for t in (
            draw(rows, H, P),
            F.softplus(draw(rows, H, seed=1) - 1),
            -draw(H, seed=2).exp(),
            draw(rows, G, N, seed=3),
            draw(rows, G, N, seed=4),
            draw(H, seed=5),
        )
    ]


def conv_reference(x: Tensor, weight: Tensor, bias: Tensor, packed: PackedSeq) -> Tensor:
    """The sum of `conv`, token by token."""
    width = weight.shape[1]
    out = []
    for document in documents(packed):
        for t in range(document.start, document.stop):
            total = bias
            for k in range(width):
                source = t - width + 1 + k
                if source >= document.start:
                    total = total + weight[:, k] * x[source]
            out.append(total * torch.sigmoid(total))
    return torch.stack(out)


SIZES = CoreSizes(heads=H, head_dim=P, groups=G, state=N, dt_limit=(0.0, math.inf), eps=1e-5)


def core_inputs(rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    channels = SIZES.channels
    return [
        t.to(dtype)
        for t in (
            draw(rows, SIZES.inner + channels + H),
            draw(channels, 4),
            draw(channels, seed=1),
            draw(H) - 1,
            -draw(H, seed=1).exp(),
            draw(H, seed=2),
            draw(SIZES.inner),
        )
    ]


CORE = ["out", "zxbcdt", "conv weight", "conv bias", "dt bias", "A", "D", "norm weight"]


def core_by_parts(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    packed: PackedSeq,
    limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    inner, shared = SIZES.inner, G * N
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * shared, H], 1)
    x, b, c = conv_reference(xbc, conv_weight, conv_bias, packed).split([inner, shared, shared], 1)
    y = scan_reference(
        x.unflatten(1, (H, P)),
        F.softplus(dt + dt_bias).clamp(*limit),
        A,
        b.unflatten(1, (G, N)),
        c.unflatten(1, (G, N)),
        D,
        packed,
    )
    return gated_rms_norm(y.flatten(1), z, norm_weight, G, 1e-5)


@pytest.mark.parametrize("chunk", [1, 8, 32])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_scan_equals_the_recurrence(chunk: int, dtype: torch.dtype, tolerance: float) -> None:
    packed = pack(LENGTHS)
    inputs = scan_inputs(packed.total, dtype)
    upstream = draw(packed.total, H, P, seed=9)
    ours = value_and_gradients(lambda *i: packed_ssd_scan(*i, packed, chunk), inputs, upstream)
    exact = [t.double() for t in inputs]
    theirs = value_and_gradients(lambda *i: scan_reference(*i, packed), exact, upstream)
    assert_near(ours, theirs, tolerance, SCAN)
    assert all(a.dtype == b.dtype for a, b in zip(ours[1:], inputs, strict=True))


@pytest.mark.parametrize("step", [0.0, 1e-6, 5.0, 37.0, 200.0, 1e4])
def test_scan_keeps_every_decay(step: float) -> None:
    """From no decay to one that clears the state at once, and both in one chunk."""
    packed = pack((70, 33))
    inputs = scan_inputs(packed.total, torch.float32)
    dt = torch.full((packed.total, H), step)
    dt[::3] = 0.1
    inputs[1], inputs[2] = dt, torch.full((H,), -1.0)
    upstream = draw(packed.total, H, P, seed=9)
    ours = value_and_gradients(lambda *i: packed_ssd_scan(*i, packed), inputs, upstream)
    exact = [t.double() for t in inputs]
    theirs = value_and_gradients(lambda *i: scan_reference(*i, packed), exact, upstream)
    assert_near(ours, theirs, 1e-5, SCAN)


def test_scan_of_one_head_a_group_and_of_one_group() -> None:
    packed = pack((40, 3))
    for heads, groups in ((3, 3), (4, 1)):
        inputs = [
            draw(43, heads, 2),
            F.softplus(draw(43, heads)),
            -draw(heads).exp(),
            draw(43, groups, 1),
            draw(43, groups, 1, seed=1),
            draw(heads),
        ]
        inputs = [t.double() for t in inputs]
        upstream = draw(43, heads, 2, seed=9)
        ours = value_and_gradients(lambda *i: packed_ssd_scan(*i, packed), inputs, upstream)
        theirs = value_and_gradients(lambda *i: scan_reference(*i, packed), inputs, upstream)
        assert_near(ours, theirs, 1e-13, SCAN)


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_convolution_equals_its_sum(width: int, dtype: torch.dtype, tolerance: float) -> None:
    packed = pack((1, 2, 9, 3, 1, 1, 20))
    inputs = [t.to(dtype) for t in (draw(packed.total, 5), draw(5, width), draw(5))]
    upstream = draw(packed.total, 5, seed=9)
    ours = value_and_gradients(lambda *i: packed_causal_conv1d(*i, packed), inputs, upstream)
    exact = [t.double() for t in inputs]
    theirs = value_and_gradients(lambda *i: conv_reference(*i, packed), exact, upstream)
    assert_near(ours, theirs, tolerance, ["y", "dx", "dw", "db"])


@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.1, 0.8)])
@pytest.mark.parametrize("chunk", [4, 32])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_core_equals_its_parts(
    limit: tuple[float, float], chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    packed = pack(LENGTHS)
    sizes = CoreSizes(heads=H, head_dim=P, groups=G, state=N, dt_limit=limit, eps=1e-5)
    inputs = core_inputs(packed.total, dtype)
    upstream = draw(packed.total, SIZES.inner, seed=9)
    ours = value_and_gradients(
        lambda *i: packed_mamba_core(*i, packed, sizes, chunk, "torch"), inputs, upstream
    )
    exact = [t.double() for t in inputs]
    theirs = value_and_gradients(lambda *i: core_by_parts(*i, packed, limit), exact, upstream)
    assert_near(ours, theirs, tolerance, CORE)


def scan_of_rows(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, packed: PackedSeq) -> Tensor:
    _, _, A, _, _, D = scan_inputs(1, x.dtype)
    return packed_ssd_scan(x, dt, A, B, C, D, packed)


def conv_of_rows(x: Tensor, packed: PackedSeq) -> Tensor:
    return packed_causal_conv1d(x, draw(5, 4, dtype=x.dtype), draw(5, dtype=x.dtype), packed)


def core_of_rows(zxbcdt: Tensor, packed: PackedSeq) -> Tensor:
    _, *rest = core_inputs(1, zxbcdt.dtype)
    return packed_mamba_core(zxbcdt, *rest, packed, SIZES, impl="torch")


def native_core_of_rows(zxbcdt: Tensor, packed: PackedSeq) -> Tensor:
    _, *rest = core_inputs(1, zxbcdt.dtype)
    return packed_mamba_core(zxbcdt, *rest, packed, SIZES, impl="native")


def rows_of(name: str, rows: int, dtype: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor]]:
    if name == "scan":
        x, dt, _, B, C, _ = scan_inputs(rows, dtype)
        return scan_of_rows, [x, dt, B, C]
    if name == "convolution":
        return conv_of_rows, [draw(rows, 5, dtype=dtype)]
    function = core_of_rows if name == "core" else native_core_of_rows
    return function, [core_inputs(rows, dtype)[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["scan", "convolution", "core", "native core"])
def test_documents_are_isolated(name: str, dtype: torch.dtype) -> None:
    packed = pack(LENGTHS)
    function, rows = rows_of(name, packed.total, dtype)
    assert_isolated(function, rows, packed)


@pytest.mark.parametrize("name", ["scan", "convolution", "core", "native core"])
def test_packed_equals_one_at_a_time(name: str) -> None:
    packed = pack(LENGTHS)
    function, rows = rows_of(name, packed.total, torch.float32)
    assert_packed_equals_alone(function, rows, packed, 1e-5)


@pytest.mark.parametrize("impl", ["torch", "native"])
def test_a_document_of_zeros_gives_zero(impl: Literal["torch", "native"]) -> None:
    packed = pack((3, 40))
    inputs = core_inputs(43, torch.float32)
    inputs[0][3:] = 0
    inputs[2].zero_()
    out = packed_mamba_core(*inputs, packed, SIZES, impl=impl)
    assert bool((out[3:] == 0).all())
    assert bool((out[:3] != 0).any())


@pytest.mark.parametrize("name", ["scan", "convolution", "core", "native core"])
def test_rows_past_two_to_the_31_elements(name: str) -> None:
    """Rows stand so far apart in memory that the last ones lie beyond 2^31 elements.

    The memory between them is never touched, so the operating system never provides it.
    """
    packed = pack((37, 1, 90, 72))
    function, rows = rows_of(name, packed.total, torch.float32)
    dense = rows[0]
    gap = 2**31 // (packed.total - 20)
    storage = torch.empty(packed.total * gap, dtype=torch.float32)
    inner = torch.empty(dense.shape[1:]).stride()
    apart = storage.as_strided(dense.shape, (gap, *inner))
    apart.copy_(dense)
    assert (packed.total - 1) * gap > 2**31
    expected = function(*rows, packed)
    assert torch.equal(function(apart, *rows[1:], packed), expected)


@pytest.mark.parametrize("lengths", [(262_144,), (200_000, 1, 5, 62_138)])
def test_a_sequence_of_262144_tokens(lengths: tuple[int, ...]) -> None:
    packed = pack(lengths)
    heads, groups, size = 2, 1, 4
    x = draw(packed.total, heads, size).requires_grad_()
    dt = F.softplus(draw(packed.total, heads, seed=1))
    B, C = draw(packed.total, groups, size, seed=2), draw(packed.total, groups, size, seed=3)
    A, D = torch.tensor([-1e-5, -0.5]), torch.ones(heads)
    y = packed_ssd_scan(x, dt, A, B, C, D, packed)
    tail = slice(packed.total - 3000, packed.total)
    (y[tail].square().sum()).backward()

    # The slow head remembers the whole document, the fast one only its last rows.
    state = torch.zeros(heads, size, size, dtype=torch.float64)
    start = packed.starts[-1].item()
    log = (dt[start:].double() * A.double()).flip(0).cumsum(0).flip(0)
    after = log.roll(-1, 0)
    after[-1] = 0
    weight = after.exp() * dt[start:].double()
    state = torch.einsum("th,tn,thp->hnp", weight, B[start:, 0].double(), x[start:].double())
    last = torch.einsum("n,hnp->hp", C[-1, 0].double(), state) + x[-1].double()
    torch.testing.assert_close(y[-1].double(), last, rtol=1e-3, atol=1e-2)
    assert x.grad is not None
    first = x.grad[start]
    assert bool(first.isfinite().all())
    assert float(first[0].abs().max()) > 0, "the slow head's gradient reaches the first token"
    if start:
        assert bool((x.grad[:start] == 0).all()), "a gradient reached another document"


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (lambda i: i.__setitem__(0, i[0][1:]), "3 rows, the packed microbatch has 4"),
        (lambda i: i.__setitem__(1, i[1][:, 1:]), r"dt is \[4, 5\], not \[4, 6\]"),
        (lambda i: i.__setitem__(4, i[4][:, :, 1:]), r"C is \[4, 3, 6\], not \[4, 3, 7\]"),
        (lambda i: i.__setitem__(5, i[5][1:]), r"D is \[5\], not \[6\]"),
    ],
)
def test_scan_names_wrong_shapes(broken: Callable[[list[Tensor]], None], rule: str) -> None:
    inputs = scan_inputs(4)
    broken(inputs)
    with pytest.raises(ValueError, match=rule):
        packed_ssd_scan(*inputs, pack((1, 3)))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="chunk 64 would lose decays: use at most 32"):
        packed_ssd_scan(*scan_inputs(4), pack((4,)), 64)
    with pytest.raises(ValueError, match="4 rows reaches beyond a chunk of 2: use at most 3"):
        packed_mamba_core(*core_inputs(4), pack((4,)), SIZES, 2)
    inputs = core_inputs(4)
    with pytest.raises(ValueError, match="columns"):
        packed_mamba_core(inputs[0][:, 1:], *inputs[1:], pack((4,)), SIZES)
    inputs[5] = inputs[5][1:]
    with pytest.raises(ValueError, match=r"D is \[5\], not \[6\]"):
        packed_mamba_core(*inputs, pack((4,)), SIZES)
    with pytest.raises(ValueError, match="5 rows, the packed microbatch has 4 tokens"):
        packed_causal_conv1d(draw(5, 5), draw(5, 4), draw(5), pack((4,)))
