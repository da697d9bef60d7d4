# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""One token of Mamba-2's mixer between its projections, in one Triton kernel.

A program has one row and one group: its heads, which share B and C, and the norm over their
outputs. The state [p, N] of each head is read and written once, in tiles of N, so that no output
waits for another program.

Letters: n rows, h heads of p, g groups, C = h p / g channels of a group, N state, W = h p + 2 g N,
K taps of the convolution. Element offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _convolved(
    new_ptr, state_ptr, weight_ptr, bias_ptr, channel, inside, W: tl.constexpr, K: tl.constexpr
):
    """silu of the convolution of channels over the last K inputs, whose states move on by one."""
    new = tl.load(new_ptr + channel, mask=inside, other=0.0)
    taps = weight_ptr + channel * K
    total = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    kept = new.to(state_ptr.dtype.element_ty)
    total += kept.to(tl.float32) * tl.load(taps + K - 1, mask=inside, other=0.0).to(tl.float32)
    for back in tl.static_range(1, K):
        at = state_ptr + (K - 1 - back) * W + channel
        old = tl.load(at, mask=inside, other=0.0)
        tap = tl.load(taps + K - 1 - back, mask=inside, other=0.0).to(tl.float32)
        total += old.to(tl.float32) * tap
        # Threads that hold copies of a value must read it before one of them writes.
        tl.debug_barrier()
        tl.store(at, kept, mask=inside)
        kept = old
    tl.debug_barrier()
    return total / (1.0 + tl.exp(-total))


@triton.jit
def mamba_kernel(
    zxbcdt_ptr, conv_ptr, ssm_ptr, slots_ptr, conv_weight_ptr, conv_bias_ptr, dt_bias_ptr, a_ptr,
    d_ptr, norm_weight_ptr, out_ptr, row_stride, dt_low, dt_high, eps,
    HEADS: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Output [n, h p] of a group's channels; its states [C, N] and [K - 1, W] change in place."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    INNER: tl.constexpr = HEADS * P
    W: tl.constexpr = INNER + 2 * G * N
    C: tl.constexpr = INNER // G
    slot = tl.load(slots_ptr + row)
    inputs = zxbcdt_ptr + row * row_stride
    xbc, conv = inputs + INNER, conv_ptr + slot * ((K - 1) * W)
    inner = tl.arange(0, BLOCK_C)
    inside = inner < C
    channel = group * C + inner
    head = channel // P
    x = _convolved(xbc, conv, conv_weight_ptr, conv_bias_ptr, channel, inside, W, K)
    raw = tl.load(inputs + INNER + W + head, mask=inside, other=0.0).to(tl.float32)
    raw += tl.load(dt_bias_ptr + head, mask=inside, other=0.0)
    small = tl.exp(-tl.abs(raw))
    # log(1 + small), whose last bits matter where the step is small.
    rest = tl.where(small < 1e-4, small - 0.5 * small * small, tl.log(1.0 + small))
    dt = tl.minimum(tl.maximum(tl.maximum(raw, 0.0) + rest, dt_low), dt_high)
    decay = tl.exp(dt * tl.load(a_ptr + head, mask=inside, other=0.0))
    y = tl.load(d_ptr + head, mask=inside, other=0.0) * x
    states = ssm_ptr + (slot * INNER + channel) * N
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        is_state = n < N
        shared = INNER + group * N + n
        b = _convolved(xbc, conv, conv_weight_ptr, conv_bias_ptr, shared, is_state, W, K)
        c = _convolved(xbc, conv, conv_weight_ptr, conv_bias_ptr, shared + G * N, is_state, W, K)
        at = states[:, None] + n[None, :]
        here = inside[:, None] & is_state[None, :]
        state = tl.load(at, mask=here, other=0.0)
        state = state * decay[:, None] + (dt * x)[:, None] * b[None, :]
        tl.debug_barrier()
        tl.store(at, state, mask=here)
        y += tl.sum(state * c[None, :], 1)
    z = tl.load(inputs + channel, mask=inside, other=0.0).to(tl.float32)
    gated = tl.where(inside, y * z / (1.0 + tl.exp(-z)), 0.0)
    scale = tl.rsqrt(tl.sum(gated * gated, 0) / C + eps)
    weight = tl.load(norm_weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    out = (gated * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * INNER + channel, out, mask=inside)
