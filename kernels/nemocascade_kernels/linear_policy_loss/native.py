"""Row kernels of the policy loss in C++ for the CPU (csrc/linear_policy_loss/).

`fused_rows` computes statistics, objective and gradient of a row while it is in the cache, with one
exponential an element. An objective without a twin uses the two row kernels of
common/linear_head/native.py, with torch between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade_kernels import native
from nemocascade_kernels.common.linear_head.native import gradient_, statistics
from nemocascade_kernels.linear_policy_loss.objectives import FusedRow

__all__ = ["fused_rows", "gradient_", "statistics"]

#: Twins in the order of `Kind` in csrc/linear_policy_loss/policy.h.
_TWINS = ("nll", "grpo", "grpo_kl", "mopd")


def fused_rows(
    logits: Tensor,
    target: Tensor,
    scale: float,
    token_weight: Tensor,
    row: FusedRow,
    grad_scale: float,
    filled: Tensor,
    first_slot: int,
    entropy: bool,
    gradient: bool,
) -> Tensor:
    """Loss, log-probability and entropy of each row, [3, R] float32; logits become the gradient.

    logits: [R, V] float32 or bfloat16; target: [R] int64. token_weight and the constants of `row`:
    [R]. On a CPU the rows are counted beforehand, so all R count: filled and first_slot are unused.
    gradient: False leaves the logits unchanged.
    """
    out = torch.empty(3, logits.shape[0])
    native.op("policy_rows_")(
        logits,
        target,
        scale,
        _TWINS.index(row.twin),
        token_weight,
        token_weight if row.a is None else row.a,
        token_weight if row.b is None else row.b,
        row.x,
        row.y,
        grad_scale,
        entropy,
        gradient,
        out,
    )
    return out
