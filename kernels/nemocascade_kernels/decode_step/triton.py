"""The decode operators on a GPU in Triton; plain products are torch's.

Nothing is read back from the device and grids follow from shapes and `longest`, so a CUDA graph can
contain a step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from nemocascade_kernels.common.tile_product import arch_of, precision
from nemocascade_kernels.decode_step.reference import draw, experts, route
from nemocascade_kernels.decode_step.sampling import SampleSettings
from nemocascade_kernels.decode_step.triton_attention import merge_kernel, split_kernel
from nemocascade_kernels.decode_step.triton_mamba import mamba_kernel
from nemocascade_kernels.decode_step.triton_mixture import mixture, norm_route, up
from nemocascade_kernels.decode_step.triton_rows import norm_kernel
from nemocascade_kernels.decode_step.triton_sample import sample_kernel
from nemocascade_kernels.decode_step.weights import MambaWeights

__all__ = [
    "attention",
    "draw",
    "experts",
    "linear",
    "mamba",
    "mixture",
    "norm",
    "norm_route",
    "route",
    "sample",
    "up",
]

FUSED = True

SPLIT = 1024
"""Tokens of a program. A part's output is 4 % of the bytes of its keys and values at 16 query heads
a key/value head; fewer tokens cost more, and more leave a small batch too few programs."""
_MERGED = 16
_STATES = 16_384
"""Elements of a state that a program of `mamba` holds at once: 64 registers a thread."""

_DRAWN = 4096
"""Logits that a program of `sample` reads at once."""


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `op.step_norm`."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        block = triton.next_power_of_2(width)
        norm_kernel[(rows,)](
            x, weight, out, x.stride(0), eps,
            H=width, BLOCK_H=block, num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
    return out


def linear(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    """See `op.step_linear`: the residual's memory holds the result, so that nothing copies it."""
    if residual is None:
        return F.linear(x, weight)
    return residual.addmm_(x, weight.t())


def mamba(
    zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor, slots: Tensor, w: MambaWeights
) -> Tensor:
    """See `op.step_mamba`."""
    heads, dim, state = ssm_state.shape[1:]
    rows, width = zxbcdt.shape[0], heads * dim
    out = torch.empty(rows, width, dtype=zxbcdt.dtype, device=zxbcdt.device)
    if not rows:
        return out
    channels = triton.next_power_of_2(width // w.groups)
    elements = _STATES if arch_of(zxbcdt.device) == 90 else _STATES // 2
    tile = max(1, min(triton.next_power_of_2(state), elements // channels))
    mamba_kernel[(rows, w.groups)](
        zxbcdt, conv_state, ssm_state, slots, w.conv_weight, w.conv_bias, w.dt_bias, w.A, w.D,
        w.norm_weight, out, zxbcdt.stride(0), *w.dt_limit, w.eps,
        HEADS=heads, P=dim, G=w.groups, N=state, K=w.conv_weight.shape[1],
        BLOCK_C=channels, BLOCK_N=tile, num_warps=8 if channels * tile > 2048 else 4, num_stages=2,
    )  # fmt: skip
    return out


def _products(dtype: torch.dtype) -> dict[str, Any]:
    """Tokens of a tile and the precision of its products. In float32, the sums of tensor cores over
    three products of tf32 are as accurate; those of other cores need too many registers."""
    if dtype == torch.float32:
        return {"TILE": 32, "PRECISION": "tf32x3"}
    return {"TILE": 64, "PRECISION": precision(dtype)}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    slots: Tensor,
    positions: Tensor,
    longest: int,
) -> Tensor:
    """See `op.step_attention`. q: also [n, g, h / g, d]. Rows and heads of q, k and v may be those
    of one product, which are not contiguous."""
    kv_heads, size = keys.shape[1:3]
    if q.dim() == 3:
        q = q.unflatten(1, (kv_heads, -1))
    rows, _, ratio, dim = q.shape
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if ratio > 1 and q.stride(2) != dim:
        q = q.contiguous()
    heads = kv_heads * ratio
    out = torch.empty(rows, heads, dim, dtype=q.dtype, device=q.device)
    if not rows:
        return out
    splits = triton.cdiv(longest, SPLIT)
    part = torch.empty(rows, heads, splits, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(rows, heads, splits, dtype=torch.float32, device=q.device)
    block_d = max(16, triton.next_power_of_2(dim))
    split_kernel[(rows, kv_heads, splits)](
        q, k, v, keys, values, table, slots, positions, part, lse,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        table.shape[1], splits, dim**-0.5 * math.log2(math.e),
        G=kv_heads, R=ratio, D=dim, B=size, SPLIT=SPLIT,
        BLOCK_R=max(16, triton.next_power_of_2(ratio)), BLOCK_D=block_d,
        **_products(q.dtype), num_warps=4, num_stages=3,
    )  # fmt: skip
    merge_kernel[(rows, heads)](
        part, lse, positions, out, heads, splits,
        D=dim, SPLIT=SPLIT, BLOCK_S=min(_MERGED, triton.next_power_of_2(splits)), BLOCK_D=block_d,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def sample(
    logits: Tensor, keys: Tensor, positions: Tensor, settings: SampleSettings
) -> tuple[Tensor, Tensor]:
    """See `steps.Steps.sample`."""
    rows, width = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        truncation = settings.truncation
        top_k, top_p, _ = truncation or (0, 1.0, 0)
        block = min(_DRAWN, triton.next_power_of_2(width))
        sample_kernel[(rows,)](
            logits, keys, positions, tokens, logprobs,
            logits.stride(0), width, settings.limit, 1.0 / (settings.temperature or 1.0),
            min(top_k, settings.limit), round(top_p * 2**53),
            GREEDY=not settings.temperature, TRUNCATED=truncation is not None, HAS_TOP_K=top_k > 0,
            OF_KEPT=truncation is not None and settings.truncated_logprobs, BLOCK=block,
            num_warps=max(1, min(16, block // 256)),
        )  # fmt: skip
    return tokens, logprobs
