"""The objective of each stage, from the fields of a packed batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemocascade_kernels import Divergence, Grpo, Mopd, Nll, Truncation

from nemocascade.megatron.distillation import Distillation
from nemocascade.recipe.grpo import GrpoConfig
from nemocascade.recipe.rl import RolloutConfig
from nemocascade.types import PackedBatch

Objective = Callable[[PackedBatch], Any]
"""Maps a batch to the objective of its loss, see `CascadeModel.forward`."""


def nll_objective(batch: PackedBatch) -> Nll:
    """Negative log-likelihood of the trained tokens, with the batch's weights."""
    return Nll(batch.token_weight)


def grpo_objective(settings: GrpoConfig) -> Objective:
    """Eq. 1 of Nemotron-Cascade 2 (arXiv 2603.19220), plus k3 to the reference if `kl_coef` is set.

    Raises ValueError for a batch without advantages, or without what the penalty needs.
    """

    def objective(batch: PackedBatch) -> Grpo:
        if batch.advantage is None:
            raise ValueError("a GRPO batch must have advantages: fill PackedBatch.advantage")
        return Grpo(
            batch.token_weight,
            batch.advantage,
            batch.ref_logprob,
            settings.kl_coef,
            settings.kl_importance,
            batch.rollout_logprob if settings.kl_importance == "rollout" else None,
            settings.kl_input_clamp,
            settings.kl_output_clamp,
        )

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


def distill_objective(divergence: Divergence) -> Objective:
    """The divergence of the student from the teachers of `PackedBatch.taught`, exact in every state
    of the rollouts."""

    def objective(batch: PackedBatch) -> Distillation:
        return Distillation(batch.token_weight, divergence, batch.taught)

    return objective


def truncation_of(settings: RolloutConfig, vocabulary: int) -> Truncation | None:
    """Truncation of the trained policy, that of its rollouts; None if it is not truncated.

    vocabulary: size of the tokenizer; later ids are never sampled.
    """
    if not settings.truncates:
        return None
    return Truncation(settings.top_k, settings.top_p, vocabulary)
