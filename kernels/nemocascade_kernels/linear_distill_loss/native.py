"""Row kernels of the divergences in C++ for the CPU (csrc/linear_distill_loss/).

`fused_rows` computes divergence and gradient of a row while it is in the cache, with two
exponentials an element. Under vocabulary parallelism the kernels of torch.py run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade_kernels import native
from nemocascade_kernels.linear_distill_loss.reference import DIVERGENCES, Divergence
from nemocascade_kernels.linear_distill_loss.torch import gradient_, mixture_parts, statistics

__all__ = [
    "fused_rows",
    "gradient_",
    "mixture_parts",
    "statistics",
]


def fused_rows(
    logits: Tensor,
    teacher: Tensor,
    scale: float,
    slope: Tensor,
    divergence: Divergence,
    gradient: bool,
) -> Tensor:
    """Divergence of each row and both log-sum-exps, [3, R] float32; the student's logits become
    slope times the gradient.

    logits, teacher: [R, V] float32 or bfloat16. slope: [R] float32; where it is 0, so are the
    results and the gradient. gradient: False leaves the logits unchanged.
    """
    out = torch.empty(3, logits.shape[0])
    # The kinds are numbered in the order of `Kind` in csrc/linear_distill_loss/divergence.h.
    kind = DIVERGENCES.index(divergence)
    native.op("divergence_rows_")(logits, teacher, scale, kind, slope, gradient, out)
    return out
