"""Causal attention of rows that continue a document: n queries over m earlier keys and their own.

Query t of n attends to the m earlier keys and to its own rows' keys up to t. On a CPU no [n, m]
matrix is made: both parts run through torch's flash kernel and are merged by their log-sum-exp.

Shape letters: n rows, m earlier keys, h query heads, g key/value heads, r = h / g, d head
dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from nemocascade_kernels import PackedSeq
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from nemocascade.megatron.context import AttendedKeys
from nemocascade.megatron.layers.attention_core import packed_attention, variable_length


def continued_attention(q: Tensor, k: Tensor, v: Tensor, keys: AttendedKeys) -> Tensor:
    """`packed_attention` of a segment, whose first document may have started before it.

    q: [S, h, d]; k, v: [U, g, d], the rows of `keys`. Returns [S, h, d].
    """
    queries, documents = keys.queries, keys.documents
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return variable_length(
            q, k, v, queries.cu_seqlens, queries.max_length, documents.cu_seqlens,
            documents.max_length,
        )  # fmt: skip
    first, attended = int(queries.lengths[0]), int(documents.lengths[0])
    if first == attended:
        return packed_attention(q, k, v, queries)
    out = lower_right_attention(q[:first], k[:attended], v[:attended])
    if first == queries.total:
        return out
    later = queries.cached(
        "later documents",
        lambda: PackedSeq.from_cu_seqlens(
            torch.cat([queries.starts[1:], torch.tensor([queries.total])]) - first, queries.device
        ),
    )
    rest = packed_attention(q[first:], k[attended:], v[attended:], later)
    return torch.cat([out, rest])


def lower_right_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention [n, h, d] of q [n, h, d], the last n rows of k, v [m + n, g, d]."""
    if not q.is_cuda:
        before = k.shape[0] - q.shape[0]
        (k_before, k), (v_before, v) = (t.tensor_split((before,)) for t in (k, v))
        return attention_after(q, k, v, k_before.transpose(0, 1), v_before.transpose(0, 1))
    return masked_attention(q, k, v)


def masked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`lower_right_attention` under a mask, of which a GPU's kernel in float32 makes no matrix."""
    ratio = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(ratio, 1) for t in (k, v))
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    mask = causal_lower_right(q.shape[2], k.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out[0].transpose(0, 1)


def attention_after(q: Tensor, k: Tensor, v: Tensor, k_before: Tensor, v_before: Tensor) -> Tensor:
    """`softmax([q k_before^T, q k^T] / sqrt(d)) [v_before, v]`, causal; [n, h, d] in q's dtype.

    On a CPU. q: [n, h, d]; k, v: [n, g, d], query head i uses key/value head i // r. k_before,
    v_before: [g, m, d] with contiguous rows, m at least 1; they are read in place.
    """
    out: Tensor = _AttentionAfter.apply(q, k, v, k_before, v_before)
    return out


class _AttentionAfter(torch.autograd.Function):
    """`attention_after`. Backward runs the kernel's own for each part, with the merged output and
    log-sum-exp: their softmax is then that of all keys, so the parts' gradients are exact."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, k_before: Tensor, v_before: Tensor
    ) -> Tensor:
        heads, kv_heads = q.shape[1], k.shape[1]
        rows = rows_of_groups(q, kv_heads)
        old, log_old = flash_attention(rows, k_before[:, None], v_before[:, None], causal=False)
        new, log_new = flash_attention(*heads_of_groups(q, k, v), causal=True)
        # [g, r, n]
        log_old = log_old.view(log_new.shape)
        share = torch.sigmoid(log_old - log_new)[..., None]
        high = torch.promote_types(q.dtype, torch.float32)
        merged = torch.lerp(new.to(high), old.view(new.shape).to(high), share)
        out = merged.view(heads, *merged.shape[2:]).transpose(0, 1).to(q.dtype)
        log_sum = torch.logaddexp(log_old, log_new)
        ctx.save_for_backward(q, k, v, k_before, v_before, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, k_before, v_before, out, log_sum = ctx.saved_tensors
        kv_heads, ratio, n = log_sum.shape
        d_rows, rows, out_rows = (rows_of_groups(t, kv_heads) for t in (grads[0], q, out))
        logs = log_sum.view(kv_heads, 1, ratio * n)
        before = k_before[:, None], v_before[:, None]
        old = _flash_backward(d_rows, rows, *before, out_rows, logs, causal=False)
        each = heads_of_groups(grads[0], k, v)[0], *heads_of_groups(q, k, v)
        out_each = heads_of_groups(out, k, v)[0]
        new = _flash_backward(*each, out_each, log_sum, causal=True)
        d_q = new[0] + old[0].view(new[0].shape)
        d_k, d_v = (t.sum(1).transpose(0, 1) for t in new[1:])
        return (
            d_q.flatten(0, 1).transpose(0, 1), d_k, d_v, old[1].squeeze(1), old[2].squeeze(1),
        )  # fmt: skip


def rows_of_groups(q: Tensor, kv_heads: int) -> Tensor:
    """[n, h, d] -> [g, 1, r n, d]. Earlier keys need no mask, so a group's query heads become rows
    of one head: keys and values are not repeated for each query head."""
    n, heads, dim = q.shape
    by_group = q.reshape(n, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
    return by_group.reshape(kv_heads, 1, -1, dim)


def heads_of_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views [g, r, n, d] of q, k and v."""
    kv_heads, ratio = k.shape[1], q.shape[1] // k.shape[1]
    q = q.unflatten(1, (kv_heads, ratio)).permute(1, 2, 0, 3)
    k, v = (t.transpose(0, 1)[:, None].expand(-1, ratio, -1, -1) for t in (k, v))
    return q, k, v


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention [g, r, n, d] over k, v [g, r, m, d], and log(sum(exp(scores))) [g, r, n]."""
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out.contiguous(), log_sum.contiguous()


def _flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the key heads of expanded k and v get one each."""
    d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q, k, v, out, log_sum, 0.0, causal
    )
    return d_q.contiguous(), d_k, d_v
