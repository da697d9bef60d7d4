"""Causal attention of a piece of a text over itself and the cached past that it follows.

Query t of n sees the m keys of the past and those of the piece up to t. No [n, m] matrix is made.
On a CPU the past is read where it lies; on a GPU one layer's past is copied beside the piece.

Shape letters: n tokens of the piece, m of the past, h query heads, g key/value heads, r = h / g,
d head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from nemocascade.megatron.layers.attention_core import variable_length


def attention_over_past(
    q: Tensor, k: Tensor, v: Tensor, past_keys: Tensor, past_values: Tensor
) -> Tensor:
    """`softmax([q past_keys^T, q k^T] / sqrt(d)) [past_values, v]`, causal; [n, h, d] in q's dtype.

    q: [n, h, d]; k, v: [n, g, d], query head i uses key/value head i // r. past_keys, past_values:
    [g, m, d] with contiguous rows, m at least 1.
    """
    if not q.is_cuda:
        return _merged(q, k, v, past_keys, past_values)
    keys, values = (
        torch.cat([past.transpose(0, 1), own]) for past, own in ((past_keys, k), (past_values, v))
    )
    if q.dtype == torch.float32:
        return _lower_right(q, keys, values)
    sizes = q.shape[0], keys.shape[0]
    cu_q, cu_k = torch.tensor([[0, size] for size in sizes], dtype=torch.int32, device=q.device)
    return variable_length(q, keys, values, cu_q, sizes[0], cu_k, sizes[1])


def _merged(q: Tensor, k: Tensor, v: Tensor, past_keys: Tensor, past_values: Tensor) -> Tensor:
    """The past and the piece one after the other, joined by the logarithms of their sums.

    Past keys need no mask, so a group's query heads stand as rows of one head: keys and values are
    read where they lie, and not repeated for each query head.
    """
    n, heads, dim = q.shape
    kv_heads = k.shape[1]
    ratio = heads // kv_heads
    by_group = q.reshape(n, kv_heads, ratio, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    old, log_old = _with_log_sum(by_group, past_keys, past_values, causal=False)
    each = q.transpose(0, 1)
    own = (t.transpose(0, 1).repeat_interleave(ratio, 0) for t in (k, v))
    new, log_new = _with_log_sum(each, *own, causal=True)
    share = torch.sigmoid(log_old.reshape(heads, n) - log_new)[:, :, None]
    out = torch.lerp(new.float(), old.reshape(heads, n, dim).float(), share)
    return out.transpose(0, 1).to(q.dtype)


def _with_log_sum(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention [g, n, d] of q [g, n, d] over k, v [g, m, d], and log(sum(exp(scores))) [g, n]."""
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], 0.0, causal
    )
    return out[0], log_sum[0].float()


def _lower_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """On a GPU in float32. k, v: [m + n, g, d]."""
    ratio = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(ratio, 1) for t in (k, v))
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    mask = causal_lower_right(q.shape[2], k.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out[0].transpose(0, 1)
