# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The terms of multi-domain on-policy distillation, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mopd_terms(teacher_logprob, train_logprob, rollout_logprob, ratio_low, ratio_high):
    """See mopd.mopd_terms."""
    advantage = teacher_logprob - train_logprob
    ratio = tl.exp(train_logprob - rollout_logprob)
    importance = tl.where((ratio >= ratio_low) & (ratio <= ratio_high), ratio, 0.0)
    return advantage, ratio, importance
