"""The definition of `attention_step`, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    longest: int,
) -> Tensor:
    """See `op.attention_step`."""
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    keys[slots, :, positions] = k.to(keys.dtype)
    values[slots, :, positions] = v.to(values.dtype)
    q = q.view(rows, kv_heads, heads // kv_heads, dim)
    past_k = keys[:, :, :longest].index_select(0, slots)
    past_v = values[:, :, :longest].index_select(0, slots)
    scores = torch.matmul(q.float(), past_k.float().transpose(2, 3)) * dim**-0.5
    ahead = torch.arange(longest, device=q.device) > positions[:, None]
    weights = scores.masked_fill_(ahead[:, None, None], float("-inf")).softmax(3)
    # Rows that were never written may hold anything, and 0 * NaN is NaN.
    past_v = past_v.float().masked_fill_(ahead[:, None, :, None], 0)
    return torch.matmul(weights, past_v).view(rows, heads, dim).to(q.dtype)
