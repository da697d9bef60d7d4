"""Mamba-2's mixer chunk by chunk in torch operators, forward and backward.

Convolution, scan (`ssd`) and gated norm run one after the other on a block of chunks, so their
intermediate values stay in a CPU's caches. Only the inputs and the states between chunks are saved
for backward, which recomputes each block.

Shape letters: those of `ssd`, and K convolution width, W = h p + 2 g n its channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.mamba2.arguments import Inputs, Sizes, States
from nemocascade_kernels.mamba2.chunks import ChunkBlock
from nemocascade_kernels.mamba2.gate import Gate, time_step_slope
from nemocascade_kernels.mamba2.ssd import (
    Chunks,
    Decays,
    Layout,
    grow_states,
    mix,
    scatter,
)
from nemocascade_kernels.mamba2.ssd_backward import inner_backward, mix_backward
from nemocascade_kernels.mamba2.states import forward_by_scan


def forward(i: Inputs, packed: PackedSeq, s: Sizes) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output [T, h p] in zxbcdt's dtype, and the states after body chunks, for backward."""
    core = _Blocks(i, s)
    out = i.zxbcdt.new_empty(i.zxbcdt.shape[0], s.inner)

    def read(block: ChunkBlock) -> Tensor:
        return F.silu(core.convolve(core.windows(block)), inplace=True)

    def write(y: Tensor, block: ChunkBlock) -> None:
        scatter(out, core.gate(y, block).out(), block)

    return out, (_scan(core.lay, s, packed, core.dt, core.A, core.D, read, write),)


def backward(
    d_out: Tensor, i: Inputs, kept: tuple[Tensor, ...], packed: PackedSeq, s: Sizes
) -> tuple[Tensor, ...]:
    """Gradients of the inputs, in their dtypes. kept: the states from `forward`."""
    core = _Blocks(i, s)
    grads = _Gradients.like(core, kept[0])
    for run in reversed(core.lay.chunks(packed).runs):
        decays = core.lay.decays(core.dt, core.A, run)
        for block in reversed(run.blocks):
            _backward_block(core, block, decays.of(block), kept[0], d_out, grads)
    sums = (grads.taps.t(), grads.bias, grads.dt_bias, grads.A, grads.D, grads.weight)
    return grads.zxbcdt, *(g.to(t.dtype) for g, t in zip(sums, i[1:], strict=True))


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
    """Run only the state-space scan, each document from a zero state.

    mixed: [T, W], the convolution's output; dt: [T, h] after softplus. Returns [T, h, p].
    """
    return scan_forward(mixed, dt, A, D, packed, s)[0]


def scan_forward(
    mixed: Tensor, dt: Tensor, A: Tensor, D: Tensor, packed: PackedSeq, s: Sizes
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`scan`, and the states after body chunks, for `scan_backward`."""
    y = mixed.new_empty(mixed.shape[0], s.heads, s.head_dim)

    def read(block: ChunkBlock) -> Tensor:
        return mixed.index_select(0, block.rows)

    def write(rows: Tensor, block: ChunkBlock) -> None:
        scatter(y, rows, block)

    states = _scan(Layout(s, mixed.dtype), s, packed, dt, A, D, read, write)
    return y, (states,)


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
    """Gradients of mixed, dt, A and D, in their dtypes. kept: from `scan_forward`."""
    (states,), lay = kept, Layout(s, mixed.dtype)
    d_mixed, d_dt, d_states = (torch.empty_like(t) for t in (mixed, dt, states))
    d_A, d_D = (torch.zeros_like(t, dtype=torch.float64) for t in (A, D))
    for run in reversed(lay.chunks(packed).runs):
        decays = lay.decays(dt, A, run)
        for block in reversed(run.blocks):
            f, rows = decays.of(block), d_y.flatten(1).index_select(0, block.rows).to(lay.dtype)
            if block.pad_slots is not None:
                rows.index_fill_(0, block.pad_slots, 0)
            dy = lay.by_head(rows, block)
            m = _chunks(lay, s, mixed.index_select(0, block.rows), block)
            result = mix(lay, block, f, m, states)
            inner = inner_backward(lay, block, f, m, result, dy)
            d = mix_backward(lay, block, f, m, inner, result.read, A, D, dy, states, d_states)
            columns = torch.cat([lay.to_rows(v, block) for v in (d.x, d.B, d.C)], dim=1)
            scatter(d_mixed, columns, block)
            scatter(d_dt, lay.to_rows(d.dt, block), block)
            d_A += d.A
            d_D += d.D
    return d_mixed, d_dt, d_A.to(A.dtype), d_D.to(D.dtype)


def _scan(
    lay: Layout,
    s: Sizes,
    packed: PackedSeq,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    read: Callable[[ChunkBlock], Tensor],
    write: Callable[[Tensor, ChunkBlock], None],
) -> Tensor:
    """Run over all blocks; returns the states after body chunks.

    read: returns the convolution's output of a block's slots, [c, s, W] or [c * s, W].
    write: gets y of a block's slots, [c * s, h p].
    """
    table = lay.chunks(packed)
    states = dt.new_empty(lay.state_shape(table.num_body), dtype=lay.dtype)
    for run in table.runs:
        decays = lay.decays(dt, A, run)
        for block in run.blocks:
            f, m = decays.of(block), _chunks(lay, s, read(block), block)
            grow_states(lay, block, f, m, states)
            y = mix(lay, block, f, m, states).y.addcmul_(m.x, lay.per_head(D))
            write(lay.to_rows(y, block), block)
    return states


def _chunks(lay: Layout, s: Sizes, mixed: Tensor, block: ChunkBlock) -> Chunks:
    """The scan's inputs. mixed: the convolution's output of the block's slots, [c, s, W]."""
    x, b, c = s.split_channels(mixed.view(-1, s.channels))
    return Chunks(lay.by_head(x, block), lay.by_group(b, block), lay.by_group(c, block))


class _Blocks:
    """The mixer's inputs, and its steps for one block of chunks."""

    def __init__(self, i: Inputs, sizes: Sizes) -> None:
        self.zxbcdt, conv_weight, conv_bias, dt_bias, self.A, self.D, norm_weight = i
        s = self.sizes = sizes
        self.lay = Layout(s, self.zxbcdt.dtype)
        self.dtype = self.lay.dtype
        self.z, self.xbc, raw_dt = s.split(self.zxbcdt)
        self.taps = conv_weight.to(self.dtype).t().contiguous().unbind()
        self.bias = conv_bias.to(self.dtype)
        self.weight = norm_weight.to(self.dtype)
        self.before = len(self.taps) - 1
        self.raw_dt = raw_dt.to(self.dtype) + dt_bias.to(self.dtype)
        self.dt = F.softplus(self.raw_dt).clamp_(*s.dt_limit)

    def windows(self, block: ChunkBlock) -> Tensor:
        """Each chunk's rows and the K - 1 rows before it, or zeros: [c, K - 1 + s, W]."""
        rows = block.rows.view(block.count, block.size)
        early = rows[:, :1].expand(-1, self.before)
        if block.enter is not None:
            early = early + torch.arange(-self.before, 0, device=rows.device)
        index = torch.cat([early, rows], dim=1)
        out = self.xbc.index_select(0, index.view(-1)).to(self.dtype).view(*index.shape, -1)
        if block.enter is None:
            out[:, : self.before] = 0
        return out

    def convolve(self, windows: Tensor) -> Tensor:
        """Convolve windows: [c, s, W], before SiLU."""
        size = windows.shape[1] - self.before
        out = torch.addcmul(self.bias, windows[:, self.before :], self.taps[self.before])
        for k in range(self.before):
            out.addcmul_(windows[:, k : k + size], self.taps[k])
        return out

    def gate(self, y: Tensor, block: ChunkBlock) -> Gate:
        """Apply the gated norm to `y` [c * s, h p]."""
        z = self.z.index_select(0, block.rows).to(self.dtype)
        return Gate(y, z, self.weight, self.sizes.groups, self.sizes.eps)


@dataclass(frozen=True)
class _Gradients:
    """Gradients of the inputs; sums over rows are float64.

    dt_slope: [T, h], the derivative of dt by its input. states: gradients of the states after body
    chunks. tails: [chunks, K - 1, W], gradients of body chunks' last rows through the next chunk's
    window.
    """

    zxbcdt: Tensor
    taps: Tensor
    bias: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    weight: Tensor
    dt_slope: Tensor
    states: Tensor
    tails: Tensor

    @classmethod
    def like(cls, core: _Blocks, entering: Tensor) -> _Gradients:
        def zeros(t: Tensor) -> Tensor:
            return torch.zeros_like(t, dtype=torch.float64)

        return cls(
            zxbcdt=torch.empty_like(core.zxbcdt, memory_format=torch.contiguous_format),
            taps=zeros(torch.stack(core.taps)),
            bias=zeros(core.bias),
            dt_bias=zeros(core.A),
            A=zeros(core.A),
            D=zeros(core.D),
            weight=zeros(core.weight),
            dt_slope=time_step_slope(core.raw_dt, core.sizes.dt_limit),
            states=torch.empty_like(entering),
            tails=entering.new_empty(entering.shape[0], core.before, core.sizes.channels),
        )


def _backward_block(
    core: _Blocks, block: ChunkBlock, f: Decays, entering: Tensor, d_out: Tensor, grads: _Gradients
) -> None:
    """Write a block's gradients and add to the sums; blocks are processed in reverse order."""
    lay = core.lay
    windows = core.windows(block)
    pre = core.convolve(windows)
    m = _chunks(lay, core.sizes, F.silu(pre), block)
    mixed = mix(lay, block, f, m, entering)
    y = torch.addcmul(mixed.y, m.x, lay.per_head(core.D))
    rows = d_out.index_select(0, block.rows).to(lay.dtype)
    if block.pad_slots is not None:
        rows.index_fill_(0, block.pad_slots, 0)
    dy, d_z, d_weight = core.gate(lay.to_rows(y, block), block).backward(rows)
    del y, rows
    dy = lay.by_head(dy, block)
    inner, read = inner_backward(lay, block, f, m, mixed, dy), mixed.read
    # Freed before the states' gradients take its place.
    del mixed
    d = mix_backward(lay, block, f, m, inner, read, core.A, core.D, dy, entering, grads.states)
    d_activated = torch.cat([lay.to_rows(v, block) for v in (d.x, d.B, d.C)], dim=1)
    d_xbc = _convolution_backward(core, block, windows, pre, d_activated, grads)
    d_raw = lay.to_rows(d.dt, block) * grads.dt_slope.index_select(0, block.rows)
    scatter(grads.zxbcdt, torch.cat([d_z, d_xbc, d_raw.to(lay.dtype)], dim=1), block)
    for total, part in (
        (grads.dt_bias, d_raw.sum(0)),
        (grads.A, d.A),
        (grads.D, d.D),
        (grads.weight, d_weight),
    ):
        total.add_(part)


def _convolution_backward(
    core: _Blocks,
    block: ChunkBlock,
    windows: Tensor,
    pre: Tensor,
    d_activated: Tensor,
    grads: _Gradients,
) -> Tensor:
    """The gradient of the block's own rows of xBC, [c * s, W]."""
    d_pre = torch.ops.aten.silu_backward(d_activated.view(pre.shape), pre)
    d_windows = torch.empty_like(windows)
    # The last tap writes the chunk's own rows and the others add; the rows before it start at zero.
    d_windows[:, : core.before] = 0
    torch.mul(d_pre, core.taps[core.before], out=d_windows[:, core.before :])
    product, d_taps = torch.empty_like(d_pre), []
    for k in range(core.before + 1):
        covered = slice(k, k + block.size)
        if k < core.before:
            d_windows[:, covered].addcmul_(d_pre, core.taps[k])
        torch.mul(windows[:, covered], d_pre, out=product)
        d_taps.append(product.sum((0, 1)))
    grads.taps.add_(torch.stack(d_taps))
    grads.bias.add_(d_pre.sum((0, 1)))
    if block.enter is not None:
        grads.tails.index_copy_(0, block.enter, d_windows[:, : core.before])
    if block.body is not None and core.before:
        d_windows[:, -core.before :] += grads.tails[block.body]
    return d_windows[:, core.before :].reshape(-1, core.sizes.channels)
