"""Copies from the host to the device, batched: each copy has a fixed cost, and one from pageable
memory makes the host wait."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

# Kernels compiled for addresses that are multiples of this many bytes load faster.
_ALIGNMENT = 16


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of host tensors on `device`, made by one transfer that the host does not wait for.

    Shapes and dtypes are kept. The results share memory. On a CPU they are the arguments.
    """
    if device.type == "cpu":
        return list(tensors)
    *starts, size = itertools.accumulate((_aligned(t.nbytes) for t in tensors), initial=0)
    # The allocator of pinned memory reuses it only after the copy.
    staged = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for view, tensor in zip(_views(staged, starts, tensors), tensors, strict=True):
        view.copy_(tensor)
    return _views(staged.to(device, non_blocking=True), starts, tensors)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _views(buffer: Tensor, starts: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of `buffer` from the bytes `starts` on, with the shapes and dtypes of `like`."""
    return [
        buffer[start : start + t.nbytes].view(t.dtype).view(t.shape)
        for start, t in zip(starts, like, strict=True)
    ]
