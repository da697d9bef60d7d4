"""Launches of the mixer's Triton kernels, and their tables and tile settings.

Shape letters: T tokens, D documents, m initial states, N chunks, h heads, p head dimension,
g groups, n state, W convolution channels, K its width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nemocascade_kernels.backends import interpreting
from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.common.tile_product import arch_of, precision
from nemocascade_kernels.common.transfer import to_device
from nemocascade_kernels.mamba2.arguments import Inputs, Sizes
from nemocascade_kernels.mamba2.limits import CHUNK, SPANS
from nemocascade_kernels.mamba2.triton_gradients import (
    gate_gradient_kernel,
    shared_gradient_kernel,
    x_gradient_kernel,
)
from nemocascade_kernels.mamba2.triton_kernels import (
    carry_kernel,
    scan_kernel,
    states_kernel,
)
from nemocascade_kernels.mamba2.triton_mix import mix_gradient_kernel, mix_kernel

#: Channels of a program of the convolution, heads of one of the time steps, elements of a state.
_COLUMNS, _HEADS, _BLOCK = 64, 16, 1024
_INTERPRETED_SPANS = 3
#: Settings of the kernels whose programs hold a group's heads: more threads, or they would spill.
#: The last two are those of float32 before Hopper, and from Hopper on.
_WIDE = {"num_warps": 8, "num_stages": 2}
_DEEP = {"num_warps": 8, "num_stages": 3}
_WIDEST = {"num_warps": 16, "num_stages": 2}


class Tables(NamedTuple):
    """Tiles and chunks of a pack: int32 on the device.

    tiles, chunks: records [tiles or N, 8], see `triton_kernels`. offsets: [D + 1], the first chunk
    of each document, and N.
    """

    tiles: Tensor
    chunks: Tensor
    offsets: Tensor


def tables(packed: PackedSeq, tile: int, chunk: int) -> Tables:
    """The pack's tables; made once for all layers and passes, with one copy to the device."""

    def make() -> Tables:
        starts, lengths = packed.starts, packed.lengths
        counts = (lengths + chunk - 1) // chunk
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        document = torch.repeat_interleave(torch.arange(packed.num_documents), counts)
        start = starts[document] + chunk * (torch.arange(len(document)) - offsets[document])
        closes = (starts + lengths)[document]
        end = (start + chunk).minimum(closes)
        number = torch.arange(len(document))
        columns = [start, start, end, number, document, starts[document], closes, closes]
        chunks = torch.stack(columns, 1)
        per_chunk = (end - start + tile - 1) // tile
        tiles = chunks.repeat_interleave(per_chunk, 0)
        first = (per_chunk.cumsum(0) - per_chunk).repeat_interleave(per_chunk)
        tiles[:, 0] += tile * (torch.arange(len(tiles)) - first)
        found = [t.to(torch.int32) for t in (tiles, chunks, offsets)]
        return Tables(*to_device(found, packed.device))

    return packed.cached(("triton chunks", tile, chunk), make)


def _tile_and_chunk(single: bool, arch: int) -> tuple[int, int]:
    """Rows of a tile, and of a chunk. Before Hopper, and in float32, larger tiles would spill."""
    if interpreting():
        return 16, 32
    return (32 if single or arch < 90 else 64), CHUNK


def _places(packed: PackedSeq, documents: tuple[int, ...] | None) -> Tensor:
    """The place of each document among the initial states, or -1: [D] int32 on the device."""

    def make() -> Tensor:
        places = torch.full((packed.num_documents,), -1, dtype=torch.int32)
        own = range(packed.num_documents) if documents is None else documents
        places[list(own)] = torch.arange(len(own), dtype=torch.int32)
        return to_device([places], packed.device)[0]

    return packed.cached(("triton places", documents), make)


class Mixed(NamedTuple):
    """rows: [T, W], the convolution's output. dt: [h, T] float32. sums: [h, T] float64."""

    rows: Tensor
    dt: Tensor
    sums: Tensor


class Call:
    """One call: its inputs as kernels take them, sizes and tables."""

    def __init__(
        self,
        tensors: tuple[Any, ...],
        packed: PackedSeq,
        s: Sizes,
        documents: tuple[int, ...] | None,
    ) -> None:
        zxbcdt, *parameters = tensors[: len(Inputs._fields)]
        self.zxbcdt = zxbcdt if zxbcdt.stride(1) == 1 else zxbcdt.contiguous()
        self.weight, self.bias, self.dt_bias, self.A, self.D, self.norm = (
            t.contiguous() for t in parameters
        )
        self.s, self.window, self.rows = s, self.weight.shape[1], self.zxbcdt.shape[0]
        self.state_size = s.heads, s.head_dim, s.state
        self.blocks = max(1, s.head_dim * s.state // _BLOCK)
        self.arch = arch_of(self.zxbcdt.device)
        self.is_single = self.zxbcdt.dtype == torch.float32
        self.tile, self.chunk = _tile_and_chunk(self.is_single, self.arch)
        self.tables = tables(packed, self.tile, self.chunk)
        self.num_documents = packed.num_documents
        self.conv, self.ssm = tensors[len(Inputs._fields) :]
        self.places: Tensor | None = None
        if self.conv is not None:
            self.conv, self.ssm = self.conv.contiguous(), self.ssm.float().contiguous()
            self.places = _places(packed, documents)
        self.has_initial = self.conv is not None
        self.precision = precision(self.zxbcdt.dtype)
        self.sizes: dict[str, Any] = {
            "H": s.heads, "P": s.head_dim, "G": s.groups, "N": s.state, "W": s.channels,
            "TILE": self.tile, "PRECISION": self.precision,
        }  # fmt: skip
        self.convolution: dict[str, Any] = {
            "H": s.heads, "INNER": s.inner, "W": s.channels, "K": self.window,
            "HAS_INITIAL": self.has_initial, "TILE": self.tile, "COLUMNS": _COLUMNS,
        }  # fmt: skip

    def mix(self) -> Mixed:
        """The convolution and the time steps."""
        s, count = self.s, len(self.tables.tiles)
        mixed = self.zxbcdt.new_empty(self.rows, s.channels)
        dt, sums = (
            mixed.new_empty(s.heads, self.rows, dtype=dtype)
            for dtype in (torch.float32, torch.float64)
        )
        blocks = triton.cdiv(s.channels, _COLUMNS) + triton.cdiv(s.heads, _HEADS)
        mix_kernel[(count, blocks)](
            self.zxbcdt, self.zxbcdt.stride(0), self.weight, self.bias, self.dt_bias, self.A,
            self.conv, self.places, mixed, dt, sums, self.tables.tiles, self.rows, *s.dt_limit,
            **self.convolution, HEADS=_HEADS,
        )  # fmt: skip
        return Mixed(mixed, dt, sums)

    def states(self, m: Mixed, final: bool) -> tuple[Tensor, Tensor | None]:
        """The states after chunks but each document's last, [N - D, h, p, n]; final states."""
        states = m.dt.new_empty(len(self.tables.chunks) - self.num_documents, *self.state_size)
        ssm = m.dt.new_empty(self.num_documents, *self.state_size) if final else None
        self._add_states(m, m.rows, m.rows[:, self.s.inner :], states, ssm, gradient=False)
        self._carry(m, states, self.ssm, ssm)
        return states, ssm

    def _state_gradients(
        self, m: Mixed, dy: Tensor, states: Tensor, d_final: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients of the states after chunks, as in `states`; of the initial states; and
        `through` of `carry_kernel`."""
        d_states = torch.empty_like(states)
        d_initial = None if self.ssm is None else torch.empty_like(self.ssm)
        c = m.rows[:, self.s.channels - self.s.groups * self.s.state :]
        self._add_states(m, dy, c, d_states, d_initial, gradient=True)
        through = m.dt.new_empty(len(self.tables.chunks), self.s.heads, self.blocks)
        self._carry(m, d_states, d_final, d_initial, (states, self.ssm, through))
        return d_states, d_initial, through

    def _add_states(
        self, m: Mixed, rows: Tensor, shared: Tensor, states: Tensor, edges: Tensor | None,
        *, gradient: bool,
    ) -> None:  # fmt: skip
        s = self.s
        states_kernel[(len(self.tables.chunks), s.heads)](
            rows, rows.stride(0), shared, shared.stride(0), m.dt, m.sums, states, edges,
            self.places, self.tables.chunks, self.rows,
            H=s.heads, RATIO=s.heads // s.groups, P=s.head_dim, N=s.state, TILE=self.tile,
            GRADIENT=gradient, HAS_EDGE=edges is not None, PRECISION=self.precision,
        )  # fmt: skip

    def _carry(
        self, m: Mixed, states: Tensor, enter: Tensor | None, leave: Tensor | None,
        reverse: tuple[Tensor | None, ...] | None = None,
    ) -> None:  # fmt: skip
        """reverse: for gradients, the states, the initial ones, and `through` of the kernel."""
        size = self.s.head_dim * self.s.state
        carry_kernel[(self.num_documents, self.s.heads * self.blocks)](
            states, enter, leave, self.places, m.sums, self.tables.chunks, self.tables.offsets,
            *(reverse or (None, None, None)), self.rows,
            H=self.s.heads, SIZE=size, BLOCK=size // self.blocks, REVERSE=reverse is not None,
            HAS_ENTER=enter is not None, HAS_LEAVE=leave is not None,
        )  # fmt: skip

    def scan(self, m: Mixed, states: Tensor) -> Tensor:
        """The output [T, h p]."""
        out = self.zxbcdt.new_empty(self.rows, self.s.inner)
        scan_kernel[(len(self.tables.tiles), self.s.groups)](
            self.zxbcdt, self.zxbcdt.stride(0), *m, states, self.ssm, self.places, self.D,
            self.norm, out, self.tables.tiles, self.rows, self.s.eps,
            HAS_INITIAL=self.has_initial, **self.sizes, **self._scan_settings,
        )  # fmt: skip
        return out

    def backward(self, d_out: Tensor | None, d_final: Tensor | None) -> list[Tensor | None]:
        """Gradients of the inputs and of the initial states; those of parameters are float32.

        d_out: None if the output has no gradient. It reads z, D, C and the norm alone.
        """
        m = self.mix()
        states, _ = self.states(m, final=False)
        d_zxbcdt = torch.empty_like(self.zxbcdt, memory_format=torch.contiguous_format)
        parameters = (self.weight, self.bias, self.dt_bias, self.A, self.D, self.norm)
        widths = [t.numel() for t in parameters]
        count = len(self.tables.tiles)
        each = triton.cdiv(count, _INTERPRETED_SPANS if interpreting() else SPANS)
        parts = m.dt.new_empty(triton.cdiv(count, each), sum(widths))
        dy = d_zxbcdt[:, self.s.inner : 2 * self.s.inner]
        # This order needs the least memory: the states are not held for B and x.
        if d_out is None:
            d_zxbcdt[:, : 2 * self.s.inner].zero_()
            parts.zero_()
            shared = m.rows.new_zeros(self.rows, self.s.groups * self.s.state)
            of_c = shared, torch.zeros_like(m.dt)
        else:
            self._gate_gradient(d_out, d_zxbcdt, m, states, parts, widths)
            of_c = self._shared_gradient(m, dy, states, self.ssm, of_b=False)
        d_states, d_ssm, through = self._state_gradients(m, dy, states, d_final)
        del states
        of_b = self._shared_gradient(m, dy, d_states, d_final, of_b=True)
        pairs, added = self._x_gradient(m, dy, d_states, d_final)
        del d_states
        sums = pairs, added, through
        d_conv = self._mix_gradient(d_zxbcdt, m, of_b, of_c, sums, parts, widths)
        totals = parts.sum(0).split(widths)
        found = (part.view(t.shape) for part, t in zip(totals, parameters, strict=True))
        return [d_zxbcdt, *found, d_conv, d_ssm]

    @property
    def _scan_settings(self) -> dict[str, int]:
        """Settings of the scan and of the gate's gradient: the others of float32 would spill."""
        if not self.is_single:
            return _WIDE
        return _WIDEST if self.arch >= 90 else _DEEP

    def _gate_gradient(
        self, d_out: Tensor, d_zxbcdt: Tensor, m: Mixed, states: Tensor, parts: Tensor,
        widths: list[int],
    ) -> None:  # fmt: skip
        """Write gradients of z, and in the columns of x those of y."""
        gate_gradient_kernel[(len(parts), self.s.groups)](
            d_out, self.zxbcdt, d_zxbcdt, self.zxbcdt.stride(0), d_zxbcdt.stride(0), *m, states,
            self.ssm, self.places, self.D, self.norm, parts, self.tables.tiles, self.rows,
            len(self.tables.tiles), self.s.eps,
            D_AT=sum(widths[:4]), WEIGHT_AT=sum(widths[:5]), PARTS=sum(widths),
            HAS_INITIAL=self.has_initial, **self.sizes, **self._scan_settings,
        )  # fmt: skip

    def _shared_gradient(
        self, m: Mixed, dy: Tensor, states: Tensor, edges: Tensor | None, *, of_b: bool
    ) -> tuple[Tensor, Tensor]:
        """The gradient of C or B [T, g n], and `along` of the kernel."""
        s = self.s
        found, along = m.rows.new_empty(self.rows, s.groups * s.state), torch.empty_like(m.dt)
        shared_gradient_kernel[(len(self.tables.tiles), s.groups)](
            dy, dy.stride(0), *m, states, edges, self.places, found, along, self.tables.tiles,
            self.rows, OF_B=of_b, HAS_EDGE=edges is not None, **self.sizes, **_WIDE,
        )  # fmt: skip
        return found, along

    def _x_gradient(
        self, m: Mixed, dy: Tensor, d_states: Tensor, d_final: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Turn x in `m.rows` into its gradient; returns `pairs` and `added` of the kernel."""
        planes = self.chunk // self.tile, 2
        pairs, added = (m.dt.new_empty(count, *m.dt.shape) for count in planes)
        x_gradient_kernel[(len(self.tables.tiles), self.s.groups)](
            dy, dy.stride(0), *m, d_states, d_final, self.D, pairs, added, self.tables.tiles,
            self.rows, HAS_FINAL=d_final is not None, **self.sizes, **_WIDE,
        )  # fmt: skip
        return pairs, added

    def _mix_gradient(
        self, d_zxbcdt: Tensor, m: Mixed, of_b: tuple[Tensor, Tensor], of_c: tuple[Tensor, Tensor],
        sums: tuple[Tensor, ...], parts: Tensor, widths: list[int],
    ) -> Tensor | None:  # fmt: skip
        """Write gradients of xBC and dt; returns that of the convolution's initial inputs.

        sums: `pairs`, `added` and `through` of the kernels.
        """
        (d_b, kept), (d_c, read), (pairs, added, through) = of_b, of_c, sums
        d_conv = None
        if self.conv is not None:
            d_conv = torch.empty_like(self.conv, dtype=torch.float32)
        grid = len(parts), triton.cdiv(self.s.channels, _COLUMNS) + self.s.heads
        mix_gradient_kernel[grid](
            self.zxbcdt, self.zxbcdt.stride(0), d_zxbcdt, d_zxbcdt.stride(0), m.rows, d_b, d_c,
            self.weight, self.bias, self.conv, self.places, d_conv, m.dt, m.sums, pairs, read,
            kept, added, through, self.dt_bias, self.A, parts, self.tables.tiles, self.rows,
            len(self.tables.tiles), *self.s.dt_limit,
            BLOCKS=self.blocks, SHARED=d_c.shape[1], DT_BIAS_AT=sum(widths[:2]),
            A_AT=sum(widths[:3]), PARTS=sum(widths), CHUNK=self.chunk,
            BEFORE=triton.next_power_of_2(max(self.window - 1, 1)), **self.convolution, **_WIDE,
        )  # fmt: skip
        return d_conv
