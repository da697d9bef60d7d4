"""Causal attention of chunked prefill: a chunk of a sequence over the KV cache and over itself.

Query t of n attends to the m cached keys and to the chunk's keys up to t. No [n, m] matrix is made.
On a CPU the cache is read in place. On a GPU one layer's cached keys and values are concatenated
with the chunk's.

Shape letters: n tokens of the chunk, m cached tokens, h query heads, g key/value heads, r = h / g,
d head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade.megatron.layers.attention_core import lower_right_attention, variable_length


def chunked_prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """`softmax([q k_cache^T, q k^T] / sqrt(d)) [v_cache, v]`, causal; [n, h, d] in q's dtype.

    q: [n, h, d]; k, v: [n, g, d], query head i uses key/value head i // r. k_cache, v_cache:
    [g, m, d] with contiguous rows, m at least 1.
    """
    if not q.is_cuda:
        return _merged(q, k, v, k_cache, v_cache)
    keys, values = (
        torch.cat([cached.transpose(0, 1), own]) for cached, own in ((k_cache, k), (v_cache, v))
    )
    if q.dtype == torch.float32:
        return lower_right_attention(q, keys, values)
    sizes = q.shape[0], keys.shape[0]
    # Made on the device: a copy from the host would make it wait.
    cu_q, cu_k = (
        torch.arange(0, size + 1, size, dtype=torch.int32, device=q.device) for size in sizes
    )
    return variable_length(q, keys, values, cu_q, sizes[0], cu_k, sizes[1])


def _merged(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """Attention over the cache and over the chunk, merged by their log-sum-exp.

    Cached keys need no mask, so a group's query heads become rows of one head: keys and values are
    read in place, and not repeated for each query head.
    """
    n, heads, dim = q.shape
    kv_heads = k.shape[1]
    ratio = heads // kv_heads
    by_group = q.reshape(n, kv_heads, ratio, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    old, log_old = _with_log_sum(by_group, k_cache, v_cache, causal=False)
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
