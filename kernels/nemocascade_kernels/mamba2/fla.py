"""The mixer on a GPU by fla-core's Triton kernels.

Only zxbcdt, the parameters and the scan's y are kept for backward, which computes the rest again.
Heads are scanned in parts and the gated norm runs over blocks of rows, so temporary memory does
not grow with the number of heads. The gradient of zxbcdt is one tensor: its columns of x hold
the gradients of y, then of the convolution's output, then of x.

Shape letters: those of `fla_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.mamba2 import fla_kernels as kernels
from nemocascade_kernels.mamba2.arguments import Inputs, Sizes, States
from nemocascade_kernels.mamba2.fla_kernels import ChunkTables, tables
from nemocascade_kernels.mamba2.gate import Gate, time_step_slope
from nemocascade_kernels.mamba2.states import forward_by_scan

# Elements of B, C or x, expanded to the heads of one part of the scan.
_PART_ELEMENTS = 2**29
# Elements that a kernel may address with 32-bit offsets.
_LIMIT = 2**31 - 1
# Elements of a block of rows in the gated norm.
_GATE_ELEMENTS = 2**27


@dataclass(frozen=True)
class HeadRange:
    """Heads that are scanned in one call, and the groups whose B and C they use.

    opens: they are the first heads of their groups.
    """

    heads: slice
    groups: slice
    opens: bool

    def columns(self, s: Sizes) -> slice:
        """The part's columns of x."""
        return slice(self.heads.start * s.head_dim, self.heads.stop * s.head_dim)


def parts(rows: int, s: Sizes) -> list[HeadRange]:
    """Split the heads equally, into whole groups or into parts of one group.

    Raises ValueError if a single head is too large for 32-bit offsets.
    """
    width = max(s.head_dim, s.state)
    if rows * width > _LIMIT:
        raise ValueError(
            f"{rows} rows of {width} elements exceed 2^31 - 1 for a single head: "
            "use fewer rows, or another backend than fla"
        )
    ratio, most = s.heads // s.groups, _PART_ELEMENTS // (rows * width)
    sizes = [n for n in range(1, s.heads + 1) if s.heads % n == 0]
    size = max((n for n in sizes if n <= most and (n % ratio == 0 or ratio % n == 0)), default=1)
    return [
        HeadRange(
            slice(lo, lo + size), slice(lo // ratio, -(-(lo + size) // ratio)), lo % ratio == 0
        )
        for lo in range(0, s.heads, size)
    ]


def workspace_bytes(rows: int, s: Sizes, element_size: int) -> int:
    """Largest temporary memory of `backward`, beside the gradients, for documents that fill chunks.

    element_size: bytes of an element of zxbcdt.
    """
    part = parts(rows, s)[0]
    heads = part.heads.stop - part.heads.start
    # States and their gradients; rows for every head; B and C of all groups.
    states = 2 * 4 * -(-rows // kernels.CHUNK) * heads * s.state * s.head_dim
    per_row = heads * (2 * s.state + 5 * s.head_dim) + 2 * s.groups * s.state
    return states + rows * per_row * element_size


def forward(i: Inputs, packed: PackedSeq, s: Sizes) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output [T, h p] in zxbcdt's dtype, and the scan's y [T, h, p] for backward."""
    z, xbc, raw_dt = s.split(i.zxbcdt)
    t, weights, biases = tables(packed), *_by_kind(i, s)
    x, *shared = _kinds(xbc, s)
    B, C = (_convolve(r, w, b, t) for r, w, b in zip(shared, weights[1:], biases[1:], strict=True))
    dt = _time_steps(raw_dt, i.dt_bias, s)[1]
    y = i.zxbcdt.new_empty(packed.total, s.heads, s.head_dim)
    for part in parts(packed.total, s):
        columns = part.columns(s)
        mixed = _convolve(x[:, columns], weights[0][columns], biases[0][columns], t)
        _Scan(s, part, t, mixed, B, C, dt, i.A, i.D).forward(y[:, part.heads])
    out = i.zxbcdt.new_empty(packed.total, s.inner)
    for rows in _blocks(packed.total, s):
        out[rows] = _gate(y, z, i, rows, s).out()
    return out, (y,)


def backward(
    d_out: Tensor, i: Inputs, kept: tuple[Tensor, ...], packed: PackedSeq, s: Sizes
) -> tuple[Tensor, ...]:
    """Gradients of the inputs, in their dtypes. kept: y from `forward`."""
    (y,), t = kept, tables(packed)
    z, xbc, raw_dt = s.split(i.zxbcdt)
    d_zxbcdt = torch.empty_like(i.zxbcdt, memory_format=torch.contiguous_format)
    d_z, d_xbc, d_raw_dt = s.split(d_zxbcdt)
    d_columns = _kinds(d_xbc, s)
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in i[1:]]
    d_weight, d_bias, d_dt_bias, d_A, d_D, d_norm = sums
    for rows in _blocks(packed.total, s):
        gate = _gate(y, z, i, rows, s)
        d_columns[0][rows], d_z[rows], d_part = gate.backward(d_out[rows].to(gate.y.dtype))
        d_norm += d_part
        del gate

    weights, biases = _by_kind(i, s)
    d_weights, d_biases = (_channels(g, s) for g in (d_weight, d_bias))
    x, *shared = _kinds(xbc, s)
    B, C = (_convolve(r, w, b, t) for r, w, b in zip(shared, weights[1:], biases[1:], strict=True))
    steps, dt = _time_steps(raw_dt, i.dt_bias, s)
    slope = time_step_slope(steps, s.dt_limit)
    for part in parts(packed.total, s):
        heads, columns = part.heads, part.columns(s)
        own = x[:, columns], weights[0][columns], biases[0][columns]
        scan = _Scan(s, part, t, _convolve(*own, t), B, C, dt, i.A, i.D)
        d = scan.backward(d_columns[0][:, columns], d_columns[1], d_columns[2])
        d_columns[0][:, columns], d_dt, d_A[heads], d_D[heads] = d
        d_raw_dt[:, heads] = d_dt.mul_(slope[:, heads])
        d_dt_bias[heads] = d_dt.sum(0)
        del scan, d, d_dt
        _convolve_backward(
            *own, t, d_columns[0][:, columns], d_weights[0][columns], d_biases[0][columns]
        )
    del B, C
    for k in (1, 2):
        r, w, b = shared[k - 1], weights[k], biases[k]
        _convolve_backward(r, w, b, t, d_columns[k], d_weights[k], d_biases[k])
    return d_zxbcdt, *(g.to(p.dtype) for g, p in zip(sums, i[1:], strict=True))


def forward_with_states(
    i: Inputs,
    packed: PackedSeq,
    s: Sizes,
    initial: States | None,
    documents: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [T, h p] in zxbcdt's dtype, and the state after each document [D, h, p, n]."""
    return forward_by_scan(i, packed, s, initial, lambda: forward(i, packed, s)[0], scan, documents)


def scan(mixed: Tensor, dt: Tensor, A: Tensor, D: Tensor, packed: PackedSeq, s: Sizes) -> Tensor:
    """Run only the state-space scan, each document from a zero state; see `torch.scan`."""
    return scan_forward(mixed, dt, A, D, packed, s)[0]


def scan_forward(
    mixed: Tensor, dt: Tensor, A: Tensor, D: Tensor, packed: PackedSeq, s: Sizes
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`scan`, which keeps nothing for `scan_backward`."""
    y = mixed.new_empty(packed.total, s.heads, s.head_dim)
    for part, scanned in _scans(mixed, dt, A, D, packed, s):
        scanned.forward(y[:, part.heads])
    return y, ()


def scan_backward(
    d_y: Tensor,
    mixed: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    kept: tuple[Tensor, ...],
    packed: PackedSeq,
    s: Sizes,
) -> tuple[Tensor, ...]:
    """Gradients of mixed, dt, A and D, in their dtypes."""
    del kept
    d_mixed, d_dt = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (mixed, dt)
    )
    d_A, d_D = torch.zeros_like(A), torch.zeros_like(D)
    d_x, d_B, d_C = _kinds(d_mixed, s)
    for part, scanned in _scans(mixed, dt, A, D, packed, s):
        heads, columns = part.heads, part.columns(s)
        d = scanned.backward(d_y.flatten(1)[:, columns], d_B, d_C)
        d_x[:, columns], d_dt[:, heads], d_A[heads], d_D[heads] = d
    return d_mixed, d_dt, d_A, d_D


def _scans(
    mixed: Tensor, dt: Tensor, A: Tensor, D: Tensor, packed: PackedSeq, s: Sizes
) -> Iterator[tuple[HeadRange, _Scan]]:
    """The scans of all parts of the heads."""
    x, B, C = (r.contiguous() for r in _kinds(mixed, s))
    for part in parts(packed.total, s):
        own = x[:, part.columns(s)].contiguous()
        yield part, _Scan(s, part, tables(packed), own, B, C, dt.float(), A, D)


class _Scan:
    """The scan of a part's heads.

    x: [T, r p], the part's columns; B, C: [T, g n], of all groups; dt: [T, h] float32.
    """

    def __init__(
        self,
        s: Sizes,
        part: HeadRange,
        t: ChunkTables,
        x: Tensor,
        B: Tensor,
        C: Tensor,
        dt: Tensor,
        A: Tensor,
        D: Tensor,
    ) -> None:
        self.sizes, self.part, self.tables = s, part, t
        self.count = part.heads.stop - part.heads.start
        self.x = x.view(-1, self.count, s.head_dim)
        self.B, self.C = (
            b.view(-1, s.groups, s.state)[:, part.groups].contiguous() for b in (B, C)
        )
        self.dt, self.A = dt[:, part.heads], A.float()[part.heads]
        self.D = D.float()[part.heads, None]
        self.v = torch.mul(self.x, self.dt[..., None], out=torch.empty_like(self.x))
        self.sums = kernels.decay_sums(self.dt * self.A, t)

    def _expanded(self, value: Tensor) -> Tensor:
        """`value` [T, g, n] for each head, [T, h, n]."""
        rows, groups, n = value.shape
        each = value[:, :, None].expand(rows, groups, self.count // groups, n)
        return each.reshape(rows, self.count, n).contiguous()

    def forward(self, out: Tensor) -> None:
        """Write y [T, h, p] to `out`."""
        B, v, sums = self._expanded(self.B), self.v, self.sums
        h = kernels.states(B, v, sums, self.tables, v.dtype)
        del B
        y = kernels.outputs(self.C, self.B, v, h, sums, self.tables)
        torch.addcmul(y, self.x, self.D.to(_high(y)), out=out)

    def backward(
        self, dy: Tensor, d_B: Tensor, d_C: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x [T, r p], dt [T, h], A and D [h]; dt's is float32.

        dy: [T, r p]. d_B, d_C: [T, g n], of all groups; those of the part's groups are written, or
        added to if the groups have earlier parts.
        """
        s, t, v, sums = self.sizes, self.tables, self.v, self.sums
        dy = dy.view(-1, self.count, s.head_dim).contiguous()
        h = kernels.states(self._expanded(self.B), v, sums, t, torch.float32)
        dh = kernels.state_gradients(self._expanded(self.C), sums, dy, t)
        d_c, d_b, d_v, d_sums = kernels.gradients(self.C, self.B, v, h, sums, dy, dh, t)
        del h, dh
        for target, value in ((d_B, d_b), (d_C, d_c)):
            own = target.view(-1, s.groups, s.state)[:, self.part.groups]
            own.copy_(value) if self.part.opens else own.add_(value)
        del d_b, d_c
        d_g, high = kernels.decay_sums_backward(d_sums, t), _high(dy)
        d_D = dy.to(high, copy=True).mul_(self.x).sum((0, 2))
        d_dt = d_v.to(high, copy=True).mul_(self.x).sum(2).float().addcmul_(d_g, self.A)
        d_x = d_v.to(high).mul_(self.dt[..., None]).addcmul_(dy.to(high), self.D.to(high))
        return d_x.view(dy.shape[0], -1), d_dt, (d_g * self.dt).sum(0), d_D


def _high(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _channels(values: Tensor, s: Sizes) -> tuple[Tensor, ...]:
    """Split [W, ...] into the channels of x, B and C."""
    shared = s.groups * s.state
    return values.split([s.inner, shared, shared])


def _by_kind(i: Inputs, s: Sizes) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The convolution's weights [W, K] and biases [W], in the channels of x, B and C."""
    return _channels(i.conv_weight.contiguous(), s), _channels(i.conv_bias.contiguous(), s)


def _kinds(xbc: Tensor, s: Sizes) -> tuple[Tensor, ...]:
    """Split `xbc` [T, W] into the columns of x, B and C."""
    shared = s.groups * s.state
    return xbc.split([s.inner, shared, shared], dim=1)


def _time_steps(raw: Tensor, bias: Tensor, s: Sizes) -> tuple[Tensor, Tensor]:
    """Time steps [T, h] before softplus, and after it; float32."""
    steps = raw.float() + bias.float()
    return steps, F.softplus(steps).clamp_(*s.dt_limit)


def _addressable(rows: Tensor) -> Tensor:
    """`rows` [T, W] themselves if 32-bit offsets reach the last one, else a contiguous copy."""
    return rows if rows.shape[0] * rows.stride(0) <= _LIMIT else rows.contiguous()


def _convolve(rows: Tensor, weight: Tensor, bias: Tensor, t: ChunkTables) -> Tensor:
    return kernels.convolution(_addressable(rows), weight, bias, t)


def _convolve_backward(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    t: ChunkTables,
    d_rows: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
) -> None:
    """Replace the convolution's gradient in `d_rows` by that of `rows`; write those of the rest."""
    found = kernels.convolution_backward(_addressable(rows), _addressable(d_rows), weight, bias, t)
    for target, value in zip((d_rows, d_weight, d_bias), found, strict=True):
        target.copy_(value)


def _blocks(rows: int, s: Sizes) -> Iterator[slice]:
    """Blocks of rows for the gated norm."""
    size = max(1, _GATE_ELEMENTS // s.inner)
    return (slice(lo, min(lo + size, rows)) for lo in range(0, rows, size))


def _gate(y: Tensor, z: Tensor, i: Inputs, rows: slice, s: Sizes) -> Gate:
    high = _high(y)
    values = (y[rows].flatten(1).to(high), z[rows].to(high), i.norm_weight.to(high))
    return Gate(*values, s.groups, s.eps)
