# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Row kernels of the policy loss in Triton.

`fused_rows` computes statistics, objective and gradient in one program a row: the row is read from
memory once, read again from L2, and written once. The objective is a small jit function passed to
the kernel as a constant. Objectives without such a twin use the two kernels of
common/linear_head/triton.py, with torch between them; so do all objectives under vocabulary
parallelism.

A twin computes `(f, df / dlogprob)` of one token from its log-probability, its weight, two
per-token constants and two settings; see `objectives.fused_row`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemocascade_kernels.common.linear_head.triton import (
    LN2,
    LOG2E,
    gradient_,
    is_padded,
    load_target,
    reduce_row,
    row_config,
    statistics,
    write_gradient,
    write_zeros,
)
from nemocascade_kernels.common.mopd_triton import mopd_terms
from nemocascade_kernels.linear_policy_loss.objectives import FusedRow

__all__ = ["fused_rows", "gradient_", "statistics"]


@triton.jit
def nll_row(logprob, weight, unused_a, unused_b, unused_x, unused_y):
    """See objectives.Nll."""
    return -weight * logprob, -weight


@triton.jit
def grpo_row(logprob, weight, advantage, unused_b, unused_x, unused_y):
    """See objectives.Grpo, with kl_coef = 0."""
    return -weight * advantage * logprob, -weight * advantage


@triton.jit
def grpo_kl_row(logprob, weight, advantage, ref_logprob, kl_coef, weighted):
    """See objectives.Grpo; weighted: 1 if kl_importance is `policy`, 0 if it is `none`."""
    difference = ref_logprob - logprob
    ratio = tl.exp(difference)
    loss = weight * (kl_coef * (ratio - difference - 1) - advantage * logprob)
    kl_slope = tl.where(weighted != 0, -difference, 1 - ratio)
    return loss, weight * (kl_coef * kl_slope - advantage)


@triton.jit
def mopd_row(logprob, weight, teacher_logprob, rollout_logprob, ratio_low, ratio_high):
    """See objectives.Mopd."""
    advantage, _, importance = mopd_terms(
        teacher_logprob, logprob, rollout_logprob, ratio_low, ratio_high
    )
    slope = -weight * importance * advantage
    return slope * logprob, slope


#: Twins by the name from `fused_row`.
_TWINS = {"nll": nll_row, "grpo": grpo_row, "grpo_kl": grpo_kl_row, "mopd": mopd_row}


@triton.jit
def fused_kernel(
    logits_ptr,
    target_ptr,
    weight_ptr,
    a_ptr,
    b_ptr,
    filled_ptr,
    out_ptr,
    stride,
    rows,
    first_slot,
    vocabulary,
    scale,
    grad_scale,
    x,
    y,
    ROW: tl.constexpr,
    GRADIENT: tl.constexpr,
    ENTROPY: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write loss, logprob, entropy to out [3, rows]; GRADIENT: logits become their gradient.

    One program a row; a slot that is not filled is not read and contributes 0.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    loss, logprob, entropy = 0.0, 0.0, 0.0
    if first_slot + row >= tl.load(filled_ptr):
        if GRADIENT:
            write_zeros(row_ptr, vocabulary, PADDED, BLOCK, VECTOR)
    else:
        # Every warp loads the target's logit, and the row is overwritten below: the load precedes
        # the reductions, whose barriers then order it before the stores.
        column, target_logit = load_target(row_ptr, target_ptr, row, vocabulary, scale)
        top, total, weighted = reduce_row(
            row_ptr, vocabulary, scale * LOG2E, ENTROPY, PADDED, BLOCK, VECTOR
        )
        log_total = tl.log(total)
        lse = top * LN2 + log_total
        logprob = tl.where(column >= 0, target_logit - lse, float("nan"))
        if ENTROPY:
            entropy = log_total - weighted * LN2 / total
        weight = tl.load(weight_ptr + row)
        loss, slope = ROW(logprob, weight, tl.load(a_ptr + row), tl.load(b_ptr + row), x, y)
        if GRADIENT:
            write_gradient(
                row_ptr, vocabulary, column, scale, lse, slope * grad_scale, 0.0, 0.0,
                False, PADDED, BLOCK, VECTOR,
            )  # fmt: skip
    tl.store(out_ptr + row, loss)
    tl.store(out_ptr + rows + row, logprob)
    tl.store(out_ptr + 2 * rows + row, entropy)


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

    logits [R, V]; target [R] int64; outside [0, V) the results are NaN. token_weight and the
    constants of `row`: [R].
    filled: scalar int64 on the device; row r counts where `first_slot + r < filled`, and becomes 0
    elsewhere. gradient: False leaves the logits unchanged.
    """
    rows, vocabulary = logits.shape
    out = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    config = row_config(vocabulary, logits.element_size())
    if rows:
        fused_kernel[(rows,)](
            logits,
            target,
            token_weight,
            token_weight if row.a is None else row.a,
            token_weight if row.b is None else row.b,
            filled,
            out,
            logits.stride(0),
            rows,
            first_slot,
            vocabulary,
            scale,
            grad_scale,
            row.x,
            row.y,
            _TWINS[row.twin],
            gradient,
            entropy,
            is_padded(logits, config),
            **config._asdict(),
        )
    return out
