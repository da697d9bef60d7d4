"""The objective of each stage, from the fields of a packed batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemocascade_kernels import Grpo, Mopd, Nll

from nemocascade.types import PackedBatch

Objective = Callable[[PackedBatch], Any]
"""Maps a batch to its objective for `linear_policy_loss`."""


def nll_objective(batch: PackedBatch) -> Nll:
    """Negative log-likelihood of the trained tokens, with the batch's weights."""
    return Nll(batch.token_weight)


def grpo_objective(kl_coef: float) -> Objective:
    """Eq. 1 of Nemotron-Cascade 2 (arXiv 2603.19220), plus k3 to the reference if `kl_coef` is set.

    Raises ValueError for a batch without advantages, or without the reference that k3 needs.
    """

    def objective(batch: PackedBatch) -> Grpo:
        if batch.advantage is None:
            raise ValueError("a GRPO batch must have advantages: fill PackedBatch.advantage")
        return Grpo(batch.token_weight, batch.advantage, batch.ref_logprob, kl_coef)

    return objective


def mopd_objective(ratio_low: float, ratio_high: float) -> Objective:
    """Eq. 2-4 of Nemotron-Cascade 2 (arXiv 2603.19220), gated to ratio_low..ratio_high.

    Raises ValueError for a batch without the log-probabilities of teacher and rollout.
    """

    def objective(batch: PackedBatch) -> Mopd:
        if batch.teacher_logprob is None or batch.rollout_logprob is None:
            raise ValueError(
                "a MOPD batch must have log-probabilities of teacher and rollout: fill "
                "PackedBatch.teacher_logprob and rollout_logprob"
            )
        return Mopd(
            batch.token_weight,
            batch.teacher_logprob,
            batch.rollout_logprob,
            ratio_low,
            ratio_high,
        )

    return objective
