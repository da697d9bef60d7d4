"""Counters of the router's kernels, which leave them as they found them: zeros."""

from __future__ import annotations

import torch
from torch import Tensor

_STATES: dict[tuple[torch.device, int, int], Tensor] = {}
"""By device, stream and size."""


def zeroed_state(device: torch.device, size: int) -> Tensor:
    """Zeros [size] int32 for one launch on the current stream.

    Launches of one stream follow each other, and share them. A graph that is captured fills its
    own, because it may be replayed on any stream, beside other graphs.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(size, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    key = device, stream, size
    if key not in _STATES:
        _STATES[key] = torch.zeros(size, dtype=torch.int32, device=device)
    return _STATES[key]
