"""Row kernels of the divergences in torch operators: the CPU path without the compiled library.

A row kernel processes the logits of a chunk of rows of student and teacher, between the matrix
products. Every implementation (this one, `native`, `triton`) has the three functions below; one
with `fused_rows` does all three at once where the rows are complete.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nemocascade_kernels.common.linear_head.torch import row_blocks
from nemocascade_kernels.linear_distill_loss.reference import Divergence
from nemocascade_kernels.linear_distill_loss.statistics import PairResult, PairStatistics


def _blocks(
    logits: Tensor, teacher: Tensor, scale: float, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows with the scaled logits of both, as copies."""
    for block in row_blocks(logits):
        yield block, logits[block].to(dtype) * scale, teacher[block].to(dtype) * scale


def statistics(
    logits: Tensor, teacher: Tensor, scale: float, divergence: Divergence
) -> PairStatistics:
    """Statistics of `x = scale * logits` and `z = scale * teacher` by row; both [R, V]."""
    rows = logits.shape[0]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    result = PairStatistics(*torch.zeros(5, rows, dtype=dtype, device=logits.device))
    for block, x, z in _blocks(logits, teacher, scale, dtype):
        maximum, teacher_maximum = x.amax(1), z.amax(1)
        p = (x - maximum[:, None]).exp_()
        q = (z - teacher_maximum[:, None]).exp_()
        result.maximum[block], result.total[block] = maximum, p.sum(1)
        result.teacher_maximum[block], result.teacher_total[block] = teacher_maximum, q.sum(1)
        if divergence == "reverse_kl":
            result.cross[block] = p.mul_(x.sub_(z)).sum(1)
        elif divergence == "forward_kl":
            result.cross[block] = q.mul_(z.sub_(x)).sum(1)
    return result


def mixture_parts(
    logits: Tensor, teacher: Tensor, scale: float, lse: Tensor, teacher_lse: Tensor
) -> Tensor:
    """A shard's parts of KL(p || m) and KL(q || m) with m = (p + q) / 2, [2, R] float32."""
    parts = lse.new_empty(2, logits.shape[0])
    for block, x, z in _blocks(logits, teacher, scale, lse.dtype):
        log_p, log_q = x.sub_(lse[block, None]), z.sub_(teacher_lse[block, None])
        # log(p / m) = log 2 - softplus(log q - log p)
        away = log_q - log_p
        ratio = math.log(2) - F.softplus(away)
        parts[0, block] = log_p.exp_().mul_(ratio).sum(1)
        parts[1, block] = log_q.exp_().mul_(ratio.add_(away)).sum(1)
    return parts


def gradient_(
    logits: Tensor,
    teacher: Tensor,
    scale: float,
    result: PairResult,
    slope: Tensor,
    divergence: Divergence,
) -> None:
    """Overwrite logits [R, V] with slope times the gradient of the divergence in them.

    With log p = x - lse: `scale p (log p - log q - inner)` for reverse_kl, `scale (p - q)` for
    forward_kl, `scale / 2 p (log(p / m) - inner)` for jensen_shannon. slope: [R] float32. A row
    whose slope is 0 becomes 0, even if it held NaN.
    """
    for block, x, z in _blocks(logits, teacher, scale, result.lse.dtype):
        log_p, log_q = x.sub_(result.lse[block, None]), z.sub_(result.teacher_lse[block, None])
        factor = (scale * slope[block])[:, None]
        if divergence == "forward_kl":
            gradient = log_p.exp_().sub_(log_q.exp_()).mul_(factor)
        else:
            p = log_p.exp()
            if divergence == "reverse_kl":
                ratio = log_p.sub_(log_q)
            else:
                ratio = math.log(2) - F.softplus(log_q.sub_(log_p))
                factor = 0.5 * factor
            gradient = p.mul_(ratio.sub_(result.inner[block, None])).mul_(factor)
        logits[block] = gradient.masked_fill_((slope[block] == 0)[:, None], 0.0)
