"""Row kernels of the divergences in Triton: their launches."""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade_kernels.common.linear_head.triton import RowConfig, is_padded, row_config
from nemocascade_kernels.linear_distill_loss.reference import DIVERGENCES, Divergence
from nemocascade_kernels.linear_distill_loss.statistics import PairResult, PairStatistics
from nemocascade_kernels.linear_distill_loss.triton_kernels import (
    fused_kernel,
    gradient_kernel,
    mixture_kernel,
    statistics_kernel,
)


def _config(logits: Tensor, teacher: Tensor) -> tuple[RowConfig, bool]:
    config = row_config(logits.shape[1], logits.element_size())
    return config, is_padded(logits, config) and is_padded(teacher, config)


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

    logits, teacher: [R, V]. slope: [R] float32; where it is 0, so are the results and the gradient.
    gradient: False leaves the logits unchanged.
    """
    rows, vocabulary = logits.shape
    out = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    if rows:
        config, padded = _config(logits, teacher)
        fused_kernel[(rows,)](
            logits,
            teacher,
            slope,
            out,
            logits.stride(0),
            teacher.stride(0),
            rows,
            vocabulary,
            scale,
            DIVERGENCES.index(divergence),
            gradient,
            padded,
            **config._asdict(),
        )
    return out


def statistics(
    logits: Tensor, teacher: Tensor, scale: float, divergence: Divergence
) -> PairStatistics:
    """See `statistics` in torch.py."""
    rows, vocabulary = logits.shape
    out = torch.empty(5, rows, dtype=torch.float32, device=logits.device)
    if rows:
        config, padded = _config(logits, teacher)
        statistics_kernel[(rows,)](
            logits,
            teacher,
            out,
            logits.stride(0),
            teacher.stride(0),
            rows,
            vocabulary,
            scale,
            DIVERGENCES.index(divergence),
            padded,
            **config._asdict(),
        )
    return PairStatistics(*out.unbind())


def mixture_parts(
    logits: Tensor, teacher: Tensor, scale: float, lse: Tensor, teacher_lse: Tensor
) -> Tensor:
    """See `mixture_parts` in torch.py."""
    rows, vocabulary = logits.shape
    out = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    if rows:
        config, padded = _config(logits, teacher)
        mixture_kernel[(rows,)](
            logits,
            teacher,
            lse,
            teacher_lse,
            out,
            logits.stride(0),
            teacher.stride(0),
            rows,
            vocabulary,
            scale,
            padded,
            **config._asdict(),
        )
    return out


def gradient_(
    logits: Tensor,
    teacher: Tensor,
    scale: float,
    result: PairResult,
    slope: Tensor,
    divergence: Divergence,
) -> None:
    """See `gradient_` in torch.py."""
    rows, vocabulary = logits.shape
    if rows:
        config, padded = _config(logits, teacher)
        gradient_kernel[(rows,)](
            logits,
            teacher,
            result.lse,
            result.teacher_lse,
            result.inner,
            slope,
            logits.stride(0),
            teacher.stride(0),
            vocabulary,
            scale,
            DIVERGENCES.index(divergence),
            padded,
            **config._asdict(),
        )
