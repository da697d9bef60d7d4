"""Copies from the host to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Start of each tensor in the transfer; kernels load vectors of 16 bytes.
_ALIGNMENT = 16


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy host tensors to `device`, in order; to a GPU by one transfer from pinned memory.

    A copy from pageable memory would wait for the device. torch reuses the pinned memory only after
    the transfer, so the host tensors may be changed or dropped at once. The copies share a storage.
    """
    if device.type != "cuda":
        return [t.to(device) for t in tensors]
    sizes = [-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in tensors]
    packed = torch.zeros(sum(sizes), dtype=torch.uint8)
    for part, t in zip(packed.split(sizes), tensors, strict=True):
        part[: t.nbytes] = t.reshape(-1).view(torch.uint8)
    sent = packed.pin_memory().to(device, non_blocking=True)
    return [
        part[: t.nbytes].view(t.dtype).view(t.shape)
        for part, t in zip(sent.split(sizes), tensors, strict=True)
    ]
