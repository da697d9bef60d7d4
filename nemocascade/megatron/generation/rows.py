"""Exchange of a decode step's rows: every rank of a group has the same number of them.

Sizes are fixed, so the host reads nothing, and a CUDA graph can contain the exchange.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def gather_rows(x: Tensor, group: Any) -> Tensor:
    """Concatenate the rows of all ranks: [n, ...] -> [size * n, ...], in rank order."""
    if group.size() == 1:
        return x
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def reduce_scatter_rows(x: Tensor, group: Any) -> Tensor:
    """Sum over all ranks and keep this rank's rows: [size * n, ...] -> [n, ...]."""
    if group.size() == 1:
        return x
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out
