"""Attention of a chunk over the KV cache, against an explicit softmax in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nemocascade.megatron.generation.chunked_prefill import chunked_prefill_attention
from nemocascade.megatron.layers.attention_core import lower_right_attention

SIZES = {
    "one token": (1, 40, 6, 2, 20),
    "one cached token": (33, 1, 4, 4, 16),
    "odd": (57, 131, 6, 2, 20),
    "one key head": (70, 19, 5, 1, 8),
}


def draw(n: int, past: int, heads: int, kv_heads: int, dim: int) -> list[Tensor]:
    """q, k, v and the past's keys and values, which are parts of larger caches."""
    generator = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    caches = [normal(kv_heads, past + 9, dim) for _ in range(2)]
    for cache in caches:
        cache[:, past:] = float("nan")
    return [
        2 * normal(n, heads, dim),
        normal(n, kv_heads, dim),
        normal(n, kv_heads, dim),
        *(cache[:, :past] for cache in caches),
    ]


def written_out(q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor) -> Tensor:
    """[n, h, d] float64."""
    n, heads, dim = q.shape
    past, ratio = old_k.shape[1], heads // k.shape[1]
    keys, values = (
        torch.cat([old.double(), new.double().transpose(0, 1)], 1).repeat_interleave(ratio, 0)
        for old, new in ((old_k, k), (old_v, v))
    )
    scores = q.double().transpose(0, 1) @ keys.transpose(1, 2) / math.sqrt(dim)
    later = torch.arange(past + n) > past + torch.arange(n)[:, None]
    return (scores.masked_fill(later, -math.inf).softmax(-1) @ values).transpose(0, 1)


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_sees_the_cache(case: str, dtype: torch.dtype) -> None:
    inputs = [t.to(dtype) for t in draw(*SIZES[case])]
    out = chunked_prefill_attention(*inputs)
    assert out.dtype == dtype
    expected = written_out(*inputs)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    assert float((out - expected).abs().max()) < tolerance * float(expected.abs().max())


@pytest.mark.parametrize("case", SIZES)
def test_the_way_of_a_gpu_in_float32(case: str) -> None:
    q, k, v, old_k, old_v = draw(*SIZES[case])
    keys, values = (torch.cat([old.transpose(0, 1), new]) for old, new in ((old_k, k), (old_v, v)))
    expected = written_out(q, k, v, old_k, old_v)
    assert float((lower_right_attention(q, keys, values) - expected).abs().max()) < 5e-6
