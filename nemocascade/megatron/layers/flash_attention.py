"""Choice of the flash-attention kernels behind torch's variable-length attention.

torch has its own FlashAttention-2. On sm_90 it can register those of the package
`flash_attn_interface`, FlashAttention-3, in their place, for the whole process.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.attention
import torch.nn.functional as F
from nemocascade_kernels import PackedSeq
from torch import Tensor

from nemocascade.megatron.layers.attention_core import packed_attention

FLASH_ATTENTION_3 = "flash_attn_interface"
"""Module of the package that has the kernels."""

_NAME = "FA3"
_VERBS = ("activate", "current", "restore")
# Largest error of bfloat16, of the largest value.
_TOLERANCE = 0.03
# Query heads, key/value heads, and their dimension: two heads share one's keys, all of a
# tensor-parallel rank of Nemotron-3-Nano do, none do.
_HEADS = ((4, 2, 128), (16, 1, 128), (4, 4, 64))


def use_flash_attention(version: int) -> None:
    """Let torch's attention run FlashAttention-3 (`version` 3), or torch's own kernels (2)."""
    torch_attention: Any = torch.nn.attention
    active = getattr(torch_attention, "current_flash_attention_impl", lambda: None)()
    if version == 3 and active != _NAME:
        torch_attention.activate_flash_attention_impl(_NAME)
    elif version == 2 and active == _NAME:
        torch_attention.restore_flash_attention_impl()


def check_flash_attention_3(device: torch.device) -> None:
    """Activate FlashAttention-3 and compare it with torch's attention in float32, forward and
    backward; torch's own kernels are active afterwards.

    Raises RuntimeError if the device or torch cannot run it or a result differs, and whatever the
    package raises.
    """
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        raise RuntimeError(f"it needs sm_90, and the device is sm_{major}{minor}")
    if not all(hasattr(torch.nn.attention, f"{verb}_flash_attention_impl") for verb in _VERBS):
        raise RuntimeError(f"torch {torch.__version__} cannot activate it: use torch 2.12 or newer")
    use_flash_attention(3)
    try:
        compare_attention(device)
    finally:
        use_flash_attention(2)


def compare_attention(device: torch.device) -> None:
    """Compare `packed_attention` in bfloat16 with one product a document in float32, for several
    numbers and dimensions of heads.

    Raises RuntimeError if the output or a gradient differs.
    """
    for shape in _HEADS:
        _compare(*shape, device)


def _compare(heads: int, shared: int, dim: int, device: torch.device) -> None:
    ends = [0, 1, 130, 391]
    packed = PackedSeq.from_cu_seqlens(ends, device)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(ends[-1], n, dim, generator=generator) for n in (heads, shared, shared)]
    upstream = torch.randn(ends[-1], heads, dim, generator=generator)
    rounded = [t.to(device, torch.bfloat16) for t in (*drawn, upstream)]
    ours = _with_gradients(lambda q, k, v: packed_attention(q, k, v, packed), rounded)
    exact = _with_gradients(
        lambda q, k, v: _by_document(q, k, v, ends), [t.float() for t in rounded]
    )
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    for name, a, b in zip(names, ours, exact, strict=True):
        error = float((a.float() - b).abs().max() / b.abs().max())
        if not error < _TOLERANCE:
            raise RuntimeError(
                f"its {name} errs by {error:.1e} of the largest value for {heads} heads that share "
                f"keys of {shared}, of dimension {dim}"
            )


def _with_gradients(run: Any, tensors: list[Tensor]) -> list[Tensor]:
    """The output of `run` and the gradients of q, k and v; the last tensor is the output's."""
    *inputs, upstream = tensors
    leaves = [t.clone().requires_grad_() for t in inputs]
    out: Tensor = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def _by_document(q: Tensor, k: Tensor, v: Tensor, ends: list[int]) -> Tensor:
    """Causal attention in each document by products of whole matrices."""
    ratio = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(ratio, 1) for t in (k, v))
    parts = []
    for low, high in itertools.pairwise(ends):
        one, keys, values = (t[low:high].transpose(0, 1) for t in (q, k, v))
        scores = one @ keys.transpose(1, 2) / q.shape[2] ** 0.5
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        weights = F.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        parts.append((weights @ values).transpose(0, 1))
    return torch.cat(parts)
