"""Attention of a chunk over the KV cache, against an explicit softmax in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemocascade.megatron.generation import chunked_prefill
from nemocascade.megatron.generation.chunked_prefill import chunked_prefill_attention
from nemocascade.megatron.layers.continued_attention import lower_right_attention, masked_attention

SIZES = {
    "one token": (1, 40, 6, 2, 20),
    "one cached token": (33, 1, 4, 4, 16),
    "odd": (57, 131, 6, 2, 20),
    "one key head": (70, 19, 5, 1, 8),
}


def draw(n: int, past: int, heads: int, kv_heads: int, dim: int) -> list[Tensor]:
    """q, and k, v with the past's keys and values first."""
    generator = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [2 * normal(n, heads, dim), *(normal(past + n, kv_heads, dim) for _ in range(2))]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention of a chunk over scattered blocks, whose other memory is NaN."""
    size, count = 16, k.shape[0]
    generator = torch.Generator().manual_seed(count)
    needed = -(-count // size)
    blocks = torch.randperm(needed + 3, generator=generator)[:needed]
    at = torch.arange(count)
    keys, values = (
        k.new_full((needed + 3, k.shape[1], size, k.shape[2]), math.nan) for _ in range(2)
    )
    for cache, tokens in ((keys, k), (values, v)):
        cache[blocks[at // size], :, at % size] = tokens
    cached = count - q.shape[0]
    return chunked_prefill_attention(q, k[cached:], v[cached:], keys, values, blocks, cached)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[n, h, d] float64."""
    n, heads, dim = q.shape
    past, ratio = k.shape[0] - n, heads // k.shape[1]
    keys, values = (t.double().transpose(0, 1).repeat_interleave(ratio, 0) for t in (k, v))
    scores = q.double().transpose(0, 1) @ keys.transpose(1, 2) / math.sqrt(dim)
    later = torch.arange(past + n) > past + torch.arange(n)[:, None]
    return (scores.masked_fill(later, -math.inf).softmax(-1) @ values).transpose(0, 1)


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_sees_the_cache(case: str, dtype: torch.dtype) -> None:
    inputs = [t.to(dtype) for t in draw(*SIZES[case])]
    out = attend(*inputs)
    assert out.dtype == dtype
    expected = written_out(*inputs)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    assert float((out - expected).abs().max()) < tolerance * float(expected.abs().max())


@pytest.mark.parametrize("case", SIZES)
def test_segments_of_the_cache_are_merged(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(*SIZES[case])
    monkeypatch.setattr(chunked_prefill, "SEGMENT", 16)
    expected = written_out(q, k, v)
    assert float((attend(q, k, v) - expected).abs().max()) < 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("case", SIZES)
def test_the_way_of_a_gpu_in_float32(case: str) -> None:
    q, k, v = draw(*SIZES[case])
    expected = written_out(q, k, v)
    assert float((masked_attention(q, k, v) - expected).abs().max()) < 5e-6


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_through_earlier_keys(case: str, dtype: torch.dtype) -> None:
    """Those of the explicit softmax, for the keys before the rows and for their own."""
    inputs = [t.to(dtype) for t in draw(*SIZES[case])]
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    exact = [t.double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(written_out(*exact), exact, upstream.double())
    own = [t.requires_grad_() for t in inputs]
    found = torch.autograd.grad(lower_right_attention(*own), own, upstream)
    tolerance = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
    for value, right in zip(found, expected, strict=True):
        assert value.dtype == dtype
        assert float((value - right).abs().max()) < tolerance * float(right.abs().max())


def test_earlier_keys_make_no_matrix_of_scores() -> None:
    """Largest tensor of 2,000 rows after 6,000: one score for each pair would be 16 M elements."""
    shapes: list[int] = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            shapes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            return out

    q, k, v = (torch.randn(n, 2, 8, requires_grad=True) for n in (2000, 8000, 8000))
    with Largest():
        lower_right_attention(q, k, v).sum().backward()
    assert 2000 * 2 * 8 <= max(shapes) <= 8000 * 2 * 8
