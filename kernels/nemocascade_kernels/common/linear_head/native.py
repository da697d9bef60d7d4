"""Row kernels in C++ for the CPU (csrc/linear_logprob/); see `torch.py` for the definitions."""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade_kernels import native
from nemocascade_kernels.common.linear_head.statistics import RowStatistics


def statistics(logits: Tensor, target: Tensor, scale: float, entropy: bool) -> RowStatistics:
    """See `statistics` in torch.py. logits: float32 or bfloat16."""
    result = torch.empty(4, logits.shape[0])
    native.op("logits_statistics")(logits, target, scale, entropy, result)
    return RowStatistics(*result)


def gradient_(
    logits: Tensor,
    target: Tensor,
    scale: float,
    lse: Tensor,
    slope: Tensor,
    entropy: Tensor | None = None,
    entropy_slope: Tensor | None = None,
) -> None:
    """See `gradient_` in torch.py. logits: float32 or bfloat16."""
    if entropy is None or entropy_slope is None:
        entropy = entropy_slope = torch.zeros_like(lse)
    native.op("logits_gradient_")(logits, target, scale, lse, slope, entropy, entropy_slope)
