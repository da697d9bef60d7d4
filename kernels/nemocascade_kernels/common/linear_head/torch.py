"""Row kernels in torch operators: the CPU path if the compiled library is missing.

A row kernel processes the logits of a chunk of rows, between the matrix products. Every
implementation (this one, `native`, `triton`) has the two functions below.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nemocascade_kernels.common.linear_head.statistics import RowStatistics

#: Peak bytes of float32 temporaries: they should stay in cache.
BLOCK_BYTES = 8 << 20


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """Blocks of the rows of logits [R, V] whose float32 copies take `BLOCK_BYTES`."""
    rows = max(1, BLOCK_BYTES // (4 * logits.shape[1]))
    for start in range(0, logits.shape[0], rows):
        yield slice(start, min(start + rows, logits.shape[0]))


def statistics(logits: Tensor, target: Tensor, scale: float, entropy: bool) -> RowStatistics:
    """Statistics of `x = scale * logits` by row.

    logits [R, V] of any floating dtype; target [R] int64, outside [0, V) if the row's target is
    not in this shard.
    """
    rows, vocabulary = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    result = RowStatistics(*torch.empty(4, rows, dtype=dtype, device=logits.device))
    for block in row_blocks(logits):
        x = logits[block].to(dtype) * scale
        maximum = x.amax(dim=1)
        local = target[block]
        inside = (local >= 0) & (local < vocabulary)
        target_logit = x.gather(1, local.clamp(0, vocabulary - 1)[:, None])[:, 0]
        x.sub_(maximum[:, None])
        weight = x.exp()
        result.maximum[block] = maximum
        result.total[block] = weight.sum(dim=1)
        result.target_logit[block] = target_logit.masked_fill_(~inside, -torch.inf)
        if entropy:
            result.weighted[block] = weight.mul_(x).sum(dim=1)
    if not entropy:
        result.weighted.zero_()
    return result


def gradient_(
    logits: Tensor,
    target: Tensor,
    scale: float,
    lse: Tensor,
    slope: Tensor,
    entropy: Tensor | None = None,
    entropy_slope: Tensor | None = None,
) -> None:
    """Overwrite logits [R, V] with their gradient of `slope * logprob + entropy_slope * entropy`.

    With `p = exp(x - lse)`: `scale * (slope (1[j = target] - p_j) - entropy_slope p_j (log p_j +
    entropy))`. lse, slope, entropy, entropy_slope are [R] float32. A row whose slopes are 0 becomes
    0, even if it held NaN.
    """
    vocabulary = logits.shape[1]
    for block in row_blocks(logits):
        x = logits[block].to(lse.dtype) * scale
        x.sub_(lse[block, None])
        p = x.exp()
        row_slope = slope[block]
        silent = row_slope == 0
        if entropy is None or entropy_slope is None:
            gradient = p.mul_(-scale * row_slope[:, None])
        else:
            silent &= entropy_slope[block] == 0
            x.add_(entropy[block, None]).mul_(entropy_slope[block, None]).add_(row_slope[:, None])
            gradient = p.mul_(x).mul_(-scale)
        local = target[block]
        inside = (local >= 0) & (local < vocabulary)
        gradient.scatter_add_(
            1, local.clamp(0, vocabulary - 1)[:, None], (scale * row_slope * inside)[:, None]
        )
        logits[block] = gradient.masked_fill_(silent[:, None], 0.0)
