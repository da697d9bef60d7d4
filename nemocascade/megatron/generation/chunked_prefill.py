"""Causal attention of chunked prefill: a chunk of a sequence over the KV cache and over itself.

Query t of n attends to the m cached keys and to the chunk's keys up to t. No [n, m] matrix is made.
On a CPU the cache is read in segments. On a GPU one layer's keys and values of the sequence are
gathered.

Shape letters: n tokens of the chunk, m cached tokens, h query heads, g key/value heads, r = h / g,
d head dimension, P blocks of B tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade.megatron.layers.attention_core import variable_length
from nemocascade.megatron.layers.continued_attention import (
    flash_attention,
    heads_of_groups,
    masked_attention,
    rows_of_groups,
)

# Cached tokens that are gathered together on a CPU, so that no copy of a long sequence is made.
SEGMENT = 4096


def chunked_prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, cached: int
) -> Tensor:
    """`softmax([q K^T, q k^T] / sqrt(d)) [V, v]`, causal; [n, h, d] in q's dtype.

    q: [n, h, d]; k, v: [n, g, d], query head i uses key/value head i // r. keys, values: [P, g, B,
    d], the caches, which hold k and v too. blocks: [(m + n) / B rounded up] int64, those of the
    sequence. cached: m, at least 1.
    """
    if not q.is_cuda:
        return _merged(q, k, v, keys, values, blocks, cached)
    end = cached + q.shape[0]
    k, v = (_gathered(cache, blocks, end) for cache in (keys, values))
    if q.dtype == torch.float32:
        return masked_attention(q, k, v)
    sizes = q.shape[0], end
    # Made on the device: a copy from the host would make it wait.
    cu_q, cu_k = (
        torch.arange(0, size + 1, size, dtype=torch.int32, device=q.device) for size in sizes
    )
    return variable_length(q, k, v, cu_q, sizes[0], cu_k, sizes[1])


def _gathered(cache: Tensor, blocks: Tensor, count: int) -> Tensor:
    """The first `count` tokens of `blocks`, [count, g, d]."""
    # Contiguous in one pass: indexing would keep the order of the cache's dimensions.
    return cache.transpose(1, 2).index_select(0, blocks).flatten(0, 1)[:count]


def _merged(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, cached: int
) -> Tensor:
    """Attention over the chunk and over segments of the cache, merged by their log-sum-exp."""
    kv_heads, size = keys.shape[1:3]
    rows = rows_of_groups(q, kv_heads)
    # [g, r, n, d] and [g, r, n]
    new, log_sum = flash_attention(*heads_of_groups(q, k, v), causal=True)
    out = new.float()
    for first in range(0, cached, SEGMENT):
        count = min(SEGMENT, cached - first)
        here = blocks[first // size : -(-(first + count) // size)]
        cached_rows = (_gathered(cache, here, count).transpose(0, 1) for cache in (keys, values))
        old, log_old = flash_attention(rows, *(t[:, None] for t in cached_rows), causal=False)
        log_old = log_old.view(log_sum.shape)
        share = torch.sigmoid(log_old - log_sum)[..., None]
        out = torch.lerp(out, old.view(out.shape).float(), share)
        log_sum = torch.logaddexp(log_sum, log_old)
    return out.flatten(0, 1).transpose(0, 1).to(q.dtype)
