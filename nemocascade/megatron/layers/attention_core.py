"""Causal attention within packed documents: `softmax(q k^T / sqrt(d)) v`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from nemocascade_kernels import PackedSeq
from torch import Tensor

# Documents up to this length are computed in batches of similar length. Longer ones are computed
# one after the other, because a call's fixed cost no longer matters.
SHORT_DOCUMENT = 64
# On a CPU, torch's attention for bf16 is slower than for fp32 up to about this length.
_FP32_UP_TO = 512


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packed: PackedSeq) -> Tensor:
    """Causal attention within each document.

    q: [T, h, d]; k, v: [T, g, d], query head i uses key/value head i // (h / g).
    Returns [T, h, d] in q's dtype. On a GPU in half precision torch's variable-length flash
    attention runs. Elsewhere torch's attention runs for one document or batch after the other.
    Raises ValueError if T is not that of `packed`.
    """
    packed.check_rows(q.shape[0], "attention's q")
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _variable_length(q, k, v, packed)
    plan = packed.cached("attention", lambda: _make_plan(packed))
    parts = []
    for segment, long in zip(_segments((q, k, v), plan), plan.long, strict=True):
        if long:
            parts.append(_attend(*(t.unsqueeze(0) for t in segment)).squeeze(0))
    for batch in plan.batches:
        rows = [t.index_select(0, batch.rows).unflatten(0, (-1, batch.width)) for t in (q, k, v)]
        parts.append(_attend(*rows).flatten(0, 1).index_select(0, batch.used_slots))
    out = torch.cat(parts)
    return out if plan.place is None else out.index_select(0, plan.place)


@dataclass(frozen=True)
class _Batch:
    """Short documents padded to `width` slots each; padding repeats the document's last row.

    Attention is causal and padding comes last, so no token attends to it.
    """

    width: int
    rows: Tensor
    used_slots: Tensor


@dataclass(frozen=True)
class _Plan:
    """The pack in segments: each a long document, or consecutive short ones.

    place: [T], index of each token's output in the concatenated segments; None if in order.
    """

    sizes: tuple[int, ...]
    long: tuple[bool, ...]
    batches: tuple[_Batch, ...]
    place: Tensor | None


def _make_plan(packed: PackedSeq) -> _Plan:
    sizes: list[int] = []
    long: list[bool] = []
    for length in packed.lengths.tolist():
        if length <= SHORT_DOCUMENT and long and not long[-1]:
            sizes[-1] += length
        else:
            sizes.append(length)
            long.append(length > SHORT_DOCUMENT)
    batches, tokens = [], []
    bound, width = 0, 8
    while width <= SHORT_DOCUMENT:
        chosen = (packed.lengths > bound) & (packed.lengths <= width)
        if bool(chosen.any()):
            starts, lengths = packed.starts[chosen, None], packed.lengths[chosen, None]
            slot = torch.arange(width)
            rows = (starts + torch.minimum(slot, lengths - 1)).reshape(-1)
            used = torch.nonzero((slot < lengths).reshape(-1)).reshape(-1)
            batches.append(_Batch(width, rows.to(packed.device), used.to(packed.device)))
            tokens.append(rows[used])
        bound, width = width, width * 2
    place = None
    if batches:
        is_long = (packed.lengths > SHORT_DOCUMENT)[packed.document_of()]
        order = torch.cat([torch.nonzero(is_long).reshape(-1), *tokens])
        place = torch.empty_like(order)
        place[order] = torch.arange(packed.total)
        place = place.to(packed.device)
    return _Plan(tuple(sizes), tuple(long), tuple(batches), place)


def _segments(tensors: tuple[Tensor, ...], plan: _Plan) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(plan.sizes) for t in tensors), strict=True))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention [b, n, h, d] of q [b, n, h, d] over k, v [b, n, g, d]."""
    dtype = q.dtype
    if not q.is_cuda and dtype == torch.bfloat16 and q.shape[1] <= _FP32_UP_TO:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    shared = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    return out.transpose(1, 2).to(dtype)


def _variable_length(q: Tensor, k: Tensor, v: Tensor, packed: PackedSeq) -> Tensor:
    ends = (packed.cu_seqlens, packed.max_length)
    return variable_length(q, k, v, *ends, *ends)


def variable_length(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    longest_q: int,
    cu_k: Tensor,
    longest_k: int,
) -> Tensor:
    """Causal attention by torch's flash kernel, on a GPU in half precision.

    q: [T, h, d]; k, v: [U, g, d]. cu_q, cu_k: [D + 1] int32, offsets of each document's queries and
    keys; its last query attends to all of its keys. longest_q, longest_k: largest number of queries
    and keys of a document. Returns [T, h, d].
    """
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11
            ratio = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    # The kernel needs dense heads; a slice of the fused projection may have gaps between rows.
    q, k, v = (t.contiguous() for t in (q, k, v))
    # A pair only if the log-sum-exp is requested.
    out = varlen_attn(q, k, v, cu_q, cu_k, longest_q, longest_k, **options)
    assert isinstance(out, torch.Tensor)
    return out


class TransformerEngineAttention(torch.nn.Module):
    """`packed_attention` by Transformer Engine, for GPUs in half precision."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        from transformer_engine.pytorch import DotProductAttention

        self.core = DotProductAttention(
            num_attention_heads=heads,
            kv_channels=head_dim,
            num_gqa_groups=kv_heads,
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal",
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSeq) -> Tensor:
        """Computes `packed_attention`."""
        packed.check_rows(q.shape[0], "attention's q")
        out: Tensor = self.core(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            cu_seqlens_q=packed.cu_seqlens,
            cu_seqlens_kv=packed.cu_seqlens,
            max_seqlen_q=packed.max_length,
            max_seqlen_kv=packed.max_length,
        )
        return out.view(q.shape)
