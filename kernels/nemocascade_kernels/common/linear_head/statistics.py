"""Statistics of a row of logits, and how shards of the vocabulary are combined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class RowStatistics(NamedTuple):
    """Statistics of one shard's scaled logits x, by row; each [R] float32.

    maximum: `m = max_j x_j`; total: `sum_j exp(x_j - m)`; target_logit: `x_target`, or -inf if
    the target is in another shard; weighted: `sum_j exp(x_j - m) (x_j - m)`, for the entropy.
    """

    maximum: Tensor
    total: Tensor
    target_logit: Tensor
    weighted: Tensor


class RowResult(NamedTuple):
    """Results of the whole vocabulary, by row; each [R] float32. entropy: None if not requested."""

    logprob: Tensor
    lse: Tensor
    entropy: Tensor | None


def logprob_and_entropy(
    logits: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Definition of `log softmax(logits / temperature)[target]` and of the softmax's entropy.

    logits [T, V], target [T] int64. Returns logprob [T] and entropy [T], in float32 (float64 for
    float64 logits); both differentiable in logits.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    distribution = torch.log_softmax(logits, dim=-1)
    logprob = distribution.gather(-1, target[:, None])[:, 0]
    return logprob, -(distribution.exp() * distribution).sum(-1)


class Shards:
    """One all-gather of a chunk's values by row over the shards of the vocabulary, in flight."""

    def __init__(self, local: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
        packed = torch.stack(tuple(local))
        self._found = packed[None]
        self._work: dist.Work | None = None
        if group is not None and group.size() > 1:
            self._found = packed.new_empty(group.size(), *packed.shape)
            self._work = dist.all_gather_into_tensor(
                self._found.view(-1, packed.shape[1]), packed, group=group, async_op=True
            )

    def wait(self) -> Tensor:
        """Every shard's values, [ranks, values, R]. On a GPU the stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        return self._found


class Gathering:
    """One all-gather of a chunk's statistics over the shards of the vocabulary, in flight."""

    def __init__(self, local: RowStatistics, group: dist.ProcessGroup | None) -> None:
        self._local = local
        self._shards = Shards(local, group) if group is not None and group.size() > 1 else None

    def wait(self) -> RowStatistics:
        """Statistics of the whole vocabulary. On a GPU the stream waits, not the host."""
        if self._shards is None:
            return self._local
        maximum, total, target_logit, weighted = self._shards.wait().unbind(1)
        top = maximum.amax(dim=0)
        shift = maximum - top
        factor = shift.exp()
        return RowStatistics(
            maximum=top,
            total=(total * factor).sum(dim=0),
            target_logit=target_logit.amax(dim=0),
            weighted=((weighted + total * shift) * factor).sum(dim=0),
        )


def finish(statistics: RowStatistics, valid: Tensor, entropy: bool) -> RowResult:
    """Log-probability, log-sum-exp and entropy of rows; NaN where `valid` [R] bool is False because
    the target is outside the vocabulary.
    """
    log_total = statistics.total.log()
    lse = statistics.maximum + log_total
    logprob = torch.where(valid, statistics.target_logit - lse, torch.nan)
    return RowResult(
        logprob, lse, log_total - statistics.weighted / statistics.total if entropy else None
    )
