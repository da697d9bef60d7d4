"""Attention within packed documents, and rotary positions."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.layers import (
    LENGTHS,
    assert_isolated,
    assert_near,
    assert_packed_equals_alone,
    documents,
    draw,
    pack,
    value_and_gradients,
)
from nemocascade_kernels import PackedSeq
from torch import Tensor

from nemocascade.megatron.layers.attention_core import (
    TransformerEngineAttention,
    packed_attention,
)
from nemocascade.megatron.layers.rope import rotary_tables, rotate

H, G, D = 6, 2, 8
# Short ones of every batch width, runs of short ones, and long ones between them.
MIXED = (1, 65, 64, 8, 9, 130, 3, 3, 200, 17)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, packed: PackedSeq) -> Tensor:
    """Softmax over one masked matrix of the whole pack."""
    owner = packed.document_of()
    row = torch.arange(packed.total)
    seen = (owner[:, None] == owner[None, :]) & (row[None, :] <= row[:, None])
    ratio = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[2])
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


def qkv(rows: int, dtype: torch.dtype, kv_heads: int = G) -> list[Tensor]:
    return [
        draw(rows, H, D, dtype=dtype),
        draw(rows, kv_heads, D, seed=1, dtype=dtype),
        draw(rows, kv_heads, D, seed=2, dtype=dtype),
    ]


@pytest.mark.parametrize("lengths", [LENGTHS, MIXED, (1,), (5, 5, 5), (100,), (70, 90)])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_attention_equals_the_masked_softmax(
    lengths: tuple[int, ...], kv_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    packed = pack(lengths)
    inputs = qkv(packed.total, dtype, kv_heads)
    upstream = draw(packed.total, H, D, seed=9)
    ours = value_and_gradients(lambda *i: packed_attention(*i, packed), inputs, upstream)
    exact = [t.double() for t in inputs]
    theirs = value_and_gradients(lambda *i: attention_reference(*i, packed), exact, upstream)
    if packed.total > 1:  # one token alone has no gradient in q and k: rounding over zero
        assert_near(ours, theirs, tolerance, ["y", "dq", "dk", "dv"])
    assert_near(ours[:1], theirs[:1], tolerance, ["y"])
    assert ours[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", [False, True])
def test_documents_are_isolated(rope: bool, dtype: torch.dtype) -> None:
    packed = pack(MIXED)

    def attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedSeq) -> Tensor:
        if rope:
            tables = rotary_tables(packed, D, 10_000.0)
            q, k = rotate(q, *tables), rotate(k, *tables)
        return packed_attention(q, k, v, packed)

    assert_isolated(attend, qkv(packed.total, dtype), packed)


@pytest.mark.parametrize("rope", [False, True])
def test_packed_equals_one_at_a_time(rope: bool) -> None:
    packed = pack(MIXED)

    def attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedSeq) -> Tensor:
        if rope:
            tables = rotary_tables(packed, D, 10_000.0)
            q, k = rotate(q, *tables), rotate(k, *tables)
        return packed_attention(q, k, v, packed)

    assert_packed_equals_alone(attend, qkv(packed.total, torch.float32), packed, 1e-5)


def test_bf16_of_long_and_short_documents() -> None:
    """Both ways to compute bf16 on a CPU: through float32, and as it is."""
    packed = pack((513, 512))
    inputs = qkv(packed.total, torch.bfloat16)
    upstream = draw(packed.total, H, D, seed=9)
    ours = value_and_gradients(lambda *i: packed_attention(*i, packed), inputs, upstream)
    exact = [t.double() for t in inputs]
    theirs = value_and_gradients(lambda *i: attention_reference(*i, packed), exact, upstream)
    assert_near(ours, theirs, 2e-2, ["y", "dq", "dk", "dv"])


@pytest.mark.parametrize("dim", [D, 4])
def test_rotation_turns_pairs_by_position_in_the_document(dim: int) -> None:
    packed = pack((3, 5))
    x = draw(8, 1, D, dtype=torch.float64)
    base = 100.0
    turned = rotate(x, *(t.double() for t in rotary_tables(packed, dim, base)))
    for document in documents(packed):
        for position, t in enumerate(range(document.start, document.stop)):
            for i in range(dim // 2):
                pair = torch.complex(x[t, 0, i], x[t, 0, i + dim // 2])
                angle = torch.tensor(position * base ** (-2 * i / dim), dtype=torch.float64)
                pair = pair * torch.polar(torch.ones_like(angle), angle)
                assert abs(turned[t, 0, i] - pair.real) < 1e-6
                assert abs(turned[t, 0, i + dim // 2] - pair.imag) < 1e-6
    assert torch.equal(turned[..., dim:], x[..., dim:])


def test_rotation_keeps_its_precision_at_the_end_of_256k() -> None:
    packed = pack((262_144,))
    cos, sin = rotary_tables(packed, 2, 10_000.0)
    last = 262_143
    assert abs(cos[last, 0].item() - math.cos(last)) < 1e-6
    assert abs(sin[last, 0].item() - math.sin(last)) < 1e-6


def test_other_microbatch_is_rejected() -> None:
    with pytest.raises(ValueError, match="attention's q has 8 rows"):
        packed_attention(*qkv(8, torch.float32), pack((9,)))


class TransformerEngineDouble:
    """Takes what Transformer Engine's DotProductAttention takes, and computes the definition."""

    def __init__(self, **settings: Any) -> None:
        assert settings["attn_mask_type"] == "padding_causal"
        assert settings["qkv_format"] == "thd"
        assert settings["attention_dropout"] == 0.0
        self.settings = settings

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **lengths: Any) -> Tensor:
        s = self.settings
        assert q.shape[1:] == (s["num_attention_heads"], s["kv_channels"])
        assert k.shape[1:] == v.shape[1:] == (s["num_gqa_groups"], s["kv_channels"])
        assert all(t.is_contiguous() for t in (q, k, v))
        cu = lengths["cu_seqlens_q"]
        assert cu.dtype == torch.int32
        assert torch.equal(cu, lengths["cu_seqlens_kv"])
        longest = int((cu[1:] - cu[:-1]).max())
        assert lengths["max_seqlen_q"] == lengths["max_seqlen_kv"] == longest
        return attention_reference(q, k, v, PackedSeq.from_cu_seqlens(cu)).flatten(1)


def test_transformer_engine_is_called_with_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    double: Any = ModuleType("transformer_engine.pytorch")
    double.DotProductAttention = TransformerEngineDouble
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", double)
    packed = pack(MIXED)
    q, k, v = qkv(packed.total, torch.float64)
    gaps = torch.stack([q, q], dim=1)[:, 0]  # rows with gaps between them
    out = TransformerEngineAttention(H, G, D)(gaps, k, v, packed)
    torch.testing.assert_close(out, packed_attention(q, k, v, packed))
