"""Statistics of a row of logits of student and teacher, and how vocabulary shards are combined."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from nemocascade_kernels.linear_distill_loss.reference import Divergence


class PairStatistics(NamedTuple):
    """Statistics of a shard of scaled logits, x of the student and z of the teacher, by row; each
    [R] float32.

    maximum: `m = max_j x_j`; total: `sum_j exp(x_j - m)`; teacher_maximum, teacher_total: those
    of z. cross: `sum_j exp(x_j - m) (x_j - z_j)` for reverse_kl, `sum_j exp(z_j - n) (z_j - x_j)`
    with n = teacher_maximum for forward_kl; unused for jensen_shannon.
    """

    maximum: Tensor
    total: Tensor
    teacher_maximum: Tensor
    teacher_total: Tensor
    cross: Tensor


class PairResult(NamedTuple):
    """Results of the whole vocabulary, by row; each [R] float32. inner: the divergence of the
    distribution in the gradient: KL(p || q) for reverse_kl, KL(p || m) for jensen_shannon."""

    divergence: Tensor
    lse: Tensor
    teacher_lse: Tensor
    inner: Tensor


def merged(shards: Tensor, divergence: Divergence) -> PairStatistics:
    """Statistics of the whole vocabulary from those of its shards, [ranks, 5, R]."""
    maximum, total, teacher_maximum, teacher_total, cross = shards.unbind(1)
    top, teacher_top = maximum.amax(0), teacher_maximum.amax(0)
    factor, teacher_factor = (maximum - top).exp(), (teacher_maximum - teacher_top).exp()
    crossed = cross * (teacher_factor if divergence == "forward_kl" else factor)
    return PairStatistics(
        top,
        (total * factor).sum(0),
        teacher_top,
        (teacher_total * teacher_factor).sum(0),
        crossed.sum(0),
    )


def finish(statistics: PairStatistics, divergence: Divergence) -> PairResult:
    """The divergence and both log-sum-exps; for jensen_shannon, divergence and inner are 0."""
    lse = statistics.maximum + statistics.total.log()
    teacher_lse = statistics.teacher_maximum + statistics.teacher_total.log()
    if divergence == "reverse_kl":
        found = statistics.cross / statistics.total - lse + teacher_lse
    elif divergence == "forward_kl":
        found = statistics.cross / statistics.teacher_total - teacher_lse + lse
    else:
        found = statistics.cross.new_zeros(statistics.cross.shape)
    return PairResult(found, lse, teacher_lse, found)
