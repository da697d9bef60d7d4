"""What stands between the two projections of the Mamba-2 mixer, computed chunk by chunk.

    [x, B, C] = silu(conv1d([x, B, C]))
    y = scan(x, softplus(dt + dt_bias), A, B, C, D)
    out = group RMSNorm(y * silu(z)) * weight

The three steps equal `conv.packed_causal_conv1d`, `ssm.packed_ssd_scan` and
`norm.gated_rms_norm`. Done one after the other for a block of chunks, their intermediate values
stay in a CPU's caches, and only the input and the states between chunks are kept for backward.
`mamba_native` does the same in C++; it runs where it can, and what stands here elsewhere.

Shape letters: as `ssd`, and K rows of the convolution's window, W = h p + 2 g n its channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nemocascade.megatron.layers.chunks import ChunkBlock, chunk_table
from nemocascade.megatron.layers.mamba_native import native_mamba_core, refusal
from nemocascade.megatron.layers.packing import PackedSeq
from nemocascade.megatron.layers.ssd import (
    LARGEST_CHUNK,
    Chunks,
    Decays,
    Layout,
    carry_states,
    mix,
    mix_backward,
    scatter,
)


@dataclass(frozen=True)
class CoreSizes:
    """Of one rank: heads h, head_dim p, groups g, state n; and constants.

    dt_limit: bounds of softplus(dt + dt_bias). eps: of the norm.
    """

    heads: int
    head_dim: int
    groups: int
    state: int
    dt_limit: tuple[float, float]
    eps: float

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.groups * self.state


def packed_mamba_core(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    packed: PackedSeq,
    sizes: CoreSizes,
    chunk: int = LARGEST_CHUNK,
    impl: Literal["auto", "native", "torch"] = "auto",
) -> Tensor:
    """The mixer between its projections (module docstring), each document by itself.

    zxbcdt: [T, h p + W + h], the parts z, x, B, C and dt; conv_weight: [W, K]; conv_bias: [W];
    dt_bias, A (negative), D: [h]; norm_weight: [h p]. Returns [T, h p] in zxbcdt's dtype.
    chunk: rows of a chunk of the torch operators. impl: "auto" is the native core in float32 and
    bfloat16 on a CPU where it is built, and torch's operators elsewhere.
    Raises ValueError if a shape is wrong, the window is longer than a chunk, or the native core is
    asked for and refused.
    """
    packed.check_rows(zxbcdt.shape[0], "the mixer's projection")
    width = sizes.inner + sizes.channels + sizes.heads
    if zxbcdt.shape[1] != width:
        raise ValueError(f"the projection has {zxbcdt.shape[1]} columns, z x B C dt need {width}")
    if conv_weight.shape[1] > chunk + 1:
        raise ValueError(
            f"a convolution over {conv_weight.shape[1]} rows reaches beyond a chunk of {chunk}: "
            f"use at most {chunk + 1}"
        )
    _check_parameters(conv_weight, conv_bias, dt_bias, A, D, norm_weight, sizes)
    refused = "torch was asked for" if impl == "torch" else refusal(zxbcdt)
    if impl == "native" and refused is not None:
        raise ValueError(f"the native core cannot run: {refused}; pass impl='torch'")
    if refused is None:
        return native_mamba_core(
            zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, packed, sizes
        )
    out: Tensor = _Core.apply(
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, packed, sizes, chunk
    )
    return out


def _check_parameters(
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    sizes: CoreSizes,
) -> None:
    heads, channels = (sizes.heads,), (sizes.channels,)
    wrong = [
        f"{name} is {list(tensor.shape)}, not {list(shape)}"
        for name, tensor, shape in (
            ("conv_weight", conv_weight, (*channels, conv_weight.shape[1])),
            ("conv_bias", conv_bias, channels),
            ("dt_bias", dt_bias, heads),
            ("A", A, heads),
            ("D", D, heads),
            ("norm_weight", norm_weight, (sizes.inner,)),
        )
        if tuple(tensor.shape) != shape
    ]
    if wrong:
        raise ValueError("packed_mamba_core: " + "; ".join(wrong))


class _Core(torch.autograd.Function):
    """Saves the inputs and the states between chunks; what a chunk holds is computed again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *inputs, packed, sizes, chunk = arguments
        core = _Blocks(tuple(inputs), sizes)
        lay, zxbcdt = core.lay, core.zxbcdt
        table = chunk_table(packed, chunk, lay.block_slots(zxbcdt.device))
        states = zxbcdt.new_empty(lay.state_shape(table.num_body), dtype=lay.dtype)
        out = zxbcdt.new_empty(zxbcdt.shape[0], sizes.inner)
        for run in table.runs:
            decays = lay.decays(core.dt, core.A, run)
            for block in run.blocks:
                f = decays.of(block.here)
                m = core.chunks(F.silu(core.convolve(core.windows(block)), inplace=True), block)
                carry_states(lay, block, f, m, states)
                y = mix(lay, block, f, m, states).y.addcmul_(m.x, lay.per_head(core.D))
                scatter(out, core.gate(lay.to_rows(y, block), block).out(), block)
        ctx.save_for_backward(*inputs, states)
        ctx.sizes, ctx.table = sizes, table
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, states = ctx.saved_tensors
        core = _Blocks(tuple(inputs), ctx.sizes)
        grads = _Gradients.like(core, states)
        for run in reversed(ctx.table.runs):
            decays = core.lay.decays(core.dt, core.A, run)
            for block in reversed(run.blocks):
                _backward_block(core, block, decays.of(block.here), states, d_out, grads)
        sums = (grads.taps.t(), grads.bias, grads.dt_bias, grads.A, grads.D, grads.weight)
        small = [g.to(t.dtype) for g, t in zip(sums, inputs[1:], strict=True)]
        return grads.zxbcdt, *small, None, None, None


class _Blocks:
    """The core's inputs, and its steps for one block of chunks."""

    def __init__(self, inputs: tuple[Tensor, ...], sizes: CoreSizes) -> None:
        self.zxbcdt, conv_weight, conv_bias, dt_bias, self.A, self.D, norm_weight = inputs
        s = self.sizes = sizes
        self.lay = Layout(s.heads, s.head_dim, s.groups, s.state, self.zxbcdt.dtype)
        self.dtype = self.lay.dtype
        self.z, self.xbc, raw_dt = self.zxbcdt.split([s.inner, s.channels, s.heads], dim=1)
        self.taps = conv_weight.to(self.dtype).t().contiguous().unbind()
        self.bias = conv_bias.to(self.dtype)
        self.weight = norm_weight.to(self.dtype)
        self.before = len(self.taps) - 1
        self.raw_dt = raw_dt.to(self.dtype) + dt_bias.to(self.dtype)
        self.dt = F.softplus(self.raw_dt).clamp_(*s.dt_limit)

    def windows(self, block: ChunkBlock) -> Tensor:
        """[c, K - 1 + s, W]: each chunk's rows and the K - 1 rows before it, or zeros."""
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
        """[c, s, W], before SiLU."""
        size = windows.shape[1] - self.before
        out = torch.addcmul(self.bias, windows[:, self.before :], self.taps[self.before])
        for k in range(self.before):
            out.addcmul_(windows[:, k : k + size], self.taps[k])
        return out

    def chunks(self, activated: Tensor, block: ChunkBlock) -> Chunks:
        """The scan's inputs. activated: silu(conv) [c, s, W]."""
        s, lay = self.sizes, self.lay
        shared = s.groups * s.state
        x, b, c = activated.view(-1, s.channels).split([s.inner, shared, shared], dim=1)
        return Chunks(lay.by_head(x, block), lay.by_group(b, block), lay.by_group(c, block))

    def gate(self, y: Tensor, block: ChunkBlock) -> _Gate:
        """The gated norm of `y` [c * s, h p]."""
        z = self.z.index_select(0, block.rows).to(self.dtype)
        return _Gate(y, z, self.weight, self.sizes.groups, self.sizes.eps)


class _Gate:
    """`norm.gated_rms_norm` on a block's rows, with what its backward needs."""

    def __init__(self, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> None:
        self.y, self.z, self.weight = y, z, weight
        self.silu = F.silu(z)
        u = (y * self.silu).view(y.shape[0], groups, -1)
        square = torch.linalg.vector_norm(u, dim=-1, keepdim=True).square_()
        self.scale = square.div_(u.shape[-1]).add_(eps).rsqrt_()
        self.normed = u.mul_(self.scale)

    def out(self) -> Tensor:
        """[c * s, h p]."""
        return self.normed.view(self.y.shape) * self.weight

    def backward(self, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of y and z [c * s, h p], and of the weight [h p]."""
        d_weight = (d_out * self.normed.view(d_out.shape)).sum(0)
        d_normed = (d_out * self.weight).view(self.normed.shape)
        along = (d_normed * self.normed).mean(-1, keepdim=True)
        d_u = d_normed.addcmul_(self.normed, along, value=-1).mul_(self.scale).view(d_out.shape)
        d_z: Tensor = torch.ops.aten.silu_backward(d_u * self.y, self.z)
        return d_u.mul_(self.silu), d_z, d_weight


@dataclass(frozen=True)
class _Gradients:
    """Of the core's inputs; sums over rows are float64.

    dt_slope: [T, h], the derivative of dt by its input. states: of the states after body chunks.
    tails: [chunks, K - 1, W], of body chunks' last rows, by way of the next chunk's window.
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
    def like(cls, core: _Blocks, states: Tensor) -> _Gradients:
        def zeros(t: Tensor) -> Tensor:
            return torch.zeros_like(t, dtype=torch.float64)

        low, high = core.sizes.dt_limit
        free = F.softplus(core.raw_dt)
        slope = core.raw_dt.sigmoid().masked_fill_((free < low) | (free > high), 0)
        return cls(
            zxbcdt=torch.empty_like(core.zxbcdt, memory_format=torch.contiguous_format),
            taps=zeros(torch.stack(core.taps)),
            bias=zeros(core.bias),
            dt_bias=zeros(core.A),
            A=zeros(core.A),
            D=zeros(core.D),
            weight=zeros(core.weight),
            dt_slope=slope,
            states=torch.empty_like(states),
            tails=states.new_empty(states.shape[0], core.before, core.sizes.channels),
        )


def _backward_block(
    core: _Blocks, block: ChunkBlock, f: Decays, states: Tensor, d_out: Tensor, grads: _Gradients
) -> None:
    """Write a block's rows of the gradients and add to the sums; blocks come in reverse order."""
    lay = core.lay
    windows = core.windows(block)
    pre = core.convolve(windows)
    m = core.chunks(F.silu(pre), block)
    mixed = mix(lay, block, f, m, states)
    y = torch.addcmul(mixed.y, m.x, lay.per_head(core.D))
    rows = d_out.index_select(0, block.rows).to(lay.dtype)
    if block.pad_slots is not None:
        rows.index_fill_(0, block.pad_slots, 0)
    dy, d_z, d_weight = core.gate(lay.to_rows(y, block), block).backward(rows)
    d = mix_backward(lay, block, f, m, mixed, core.A, core.D, lay.by_head(dy, block), grads.states)
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
    """[c * s, W]: the gradient of the block's own rows of xBC."""
    d_pre = torch.ops.aten.silu_backward(d_activated.view(pre.shape), pre)
    d_windows = torch.empty_like(windows)
    # The last tap writes the chunk's own rows, the others add; the rows before it begin at zero.
    d_windows[:, : core.before] = 0
    torch.mul(d_pre, core.taps[core.before], out=d_windows[:, core.before :])
    product = torch.empty_like(d_pre)
    for k in range(core.before + 1):
        covered = slice(k, k + block.size)
        if k < core.before:
            d_windows[:, covered].addcmul_(d_pre, core.taps[k])
        torch.mul(windows[:, covered], d_pre, out=product)
        grads.taps[k].add_(product.sum((0, 1)))
    grads.bias.add_(d_pre.sum((0, 1)))
    if block.enter is not None:
        grads.tails.index_copy_(0, block.enter, d_windows[:, : core.before])
    if block.body is not None and core.before:
        d_windows[:, -core.before :] += grads.tails[block.body]
    return d_windows[:, core.before :].reshape(-1, core.sizes.channels)
