"""Objectives: functions of one token's log-probability and of given constants.

A loss of this family is `L = sum_t f_t(log pi(y_t | s_t))`. An objective is a dataclass with the
per-token constants as fields and one small function, `token_loss`, that is f. Its derivative is
computed by autograd on the vector of log-probabilities, so a new objective needs nothing else:

    @dataclass(frozen=True)
    class Focal(Objective):
        gamma: float = 2.0

        def token_loss(self, logprob: Tensor) -> Tensor:
            return -self.token_weight * (1 - logprob.exp()) ** self.gamma * logprob

It runs on every backend. An objective that `fused_row` knows also has a twin in the fused kernels
of triton.py and native.py, which saves one read of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from nemocascade_kernels.common.mopd import MopdTerms, mopd_terms


@dataclass(frozen=True)
class Objective:
    """Base of all objectives.

    token_weight: [T] float32; mask and normaliser in one. A row of weight 0 is not computed, and
        its other fields are ignored.
    """

    token_weight: Tensor

    def token_loss(self, logprob: Tensor) -> Tensor:
        """f of each token, [R]; differentiable in logprob [R] float32. The fields are [R] here."""
        raise NotImplementedError  # the base has no loss; every objective defines its own

    def metrics(self, logprob: Tensor) -> dict[str, Tensor]:
        """Metrics of each token, [R], whose means over the trained tokens are reported."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The per-token fields by name."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in given.items() if isinstance(value, Tensor)}

    def at(self, rows: Tensor | slice) -> Self:
        """The objective restricted to some rows, with contiguous fields."""
        chosen = {name: value[rows].contiguous() for name, value in self.tensors().items()}
        return replace(self, **chosen)

    def check(self, tokens: int, device: torch.device) -> None:
        """Raise ValueError, naming every fault, unless all fields are [tokens] float32."""
        faults = [
            f"{name} is {tuple(value.shape)} {value.dtype} {value.device}"
            for name, value in self.tensors().items()
            if value.shape != (tokens,) or value.dtype != torch.float32 or value.device != device
        ]
        if faults:
            raise ValueError(
                f"{type(self).__name__}: {'; '.join(faults)}: every field must be ({tokens},) "
                f"torch.float32 {device}"
            )


@dataclass(frozen=True)
class Nll(Objective):
    """Negative log-likelihood, `f = -w log pi`: supervised fine-tuning."""

    def token_loss(self, logprob: Tensor) -> Tensor:
        return -self.token_weight * logprob


KlImportance = Literal["policy", "rollout", "none"]
"""Importance weight of the KL estimate; see `Grpo`."""


@dataclass(frozen=True)
class Grpo(Objective):
    """Strictly on-policy GRPO (Nemotron-Cascade 2, Eq. 1), with an optional penalty.

    `f = w (-A log pi + kl_coef u k3)`, `k3 = exp(d) - d - 1` with `d = log pi_ref - log pi`: the
    unbiased, never negative estimate of KL(pi || pi_ref) (Schulman, "Approximating KL divergence").
    One gradient step a rollout batch: the ratio of Eq. 1 is 1, and its gradient is that of log pi.

    advantage: [T] float32. ref_logprob: [T] float32, needed if kl_coef is not 0.
    kl_importance: the weight u. The tokens are samples of pi, so the gradient of the KL is that of
        u k3 with the gradient of u (arXiv 2506.09477). `policy`: `u = pi / sg[pi]`, which is 1, and
        d/dlogpi (u k3) = -d. `rollout`: `u = pi / pi_rollout`, which needs rollout_logprob [T]
        float32. `none`: `u = 1` without a gradient: 1 - exp(d).
    kl_input_clamp: clamp d to this absolute value; a clamped token has no gradient of the penalty.
    kl_output_clamp: upper bound of u k3, without a gradient beyond. None: no clamp.
    """

    advantage: Tensor
    ref_logprob: Tensor | None = None
    kl_coef: float = 0.0
    kl_importance: KlImportance = "policy"
    rollout_logprob: Tensor | None = None
    kl_input_clamp: float | None = None
    kl_output_clamp: float | None = None

    def __post_init__(self) -> None:
        if self.kl_coef == 0:
            return
        if self.ref_logprob is None:
            raise ValueError(f"kl_coef={self.kl_coef} needs ref_logprob: give it, or set kl_coef=0")
        if self.kl_importance == "rollout" and self.rollout_logprob is None:
            raise ValueError("kl_importance='rollout' needs rollout_logprob: give it")

    def token_loss(self, logprob: Tensor) -> Tensor:
        loss = -self.advantage * logprob
        if self.kl_coef != 0:
            loss = loss + self.kl_coef * self._penalty(logprob)
        return self.token_weight * loss

    def metrics(self, logprob: Tensor) -> dict[str, Tensor]:
        found = {"advantage": self.advantage}
        if self.ref_logprob is not None:
            found["kl"] = _k3(self.ref_logprob - logprob)
        return found

    def _penalty(self, logprob: Tensor) -> Tensor:
        """`u k3` with its clamps, [R]."""
        assert self.ref_logprob is not None
        difference = given = self.ref_logprob - logprob
        if self.kl_input_clamp is not None:
            difference = given.clamp(-self.kl_input_clamp, self.kl_input_clamp)
        penalty = _k3(difference)
        if self.kl_importance != "none":
            base = self.rollout_logprob if self.kl_importance == "rollout" else logprob.detach()
            assert base is not None
            weight = torch.exp(logprob - base)
            penalty = torch.where(difference == given, weight, weight.detach()) * penalty
        if self.kl_output_clamp is not None:
            penalty = penalty.clamp(max=self.kl_output_clamp)
        return penalty


def _k3(difference: Tensor) -> Tensor:
    return torch.expm1(difference) - difference


@dataclass(frozen=True)
class Mopd(Objective):
    """Multi-domain on-policy distillation (Nemotron-Cascade 2, Eq. 2-4).

    `f = -w sg[w_t] sg[a_t] log pi`, with a and w_t of `mopd_advantage` at this pass's own
    log-probability. The mean of Eq. 4, by sequence, is in token_weight.

    teacher_logprob, rollout_logprob: [T] float32. ratio_low, ratio_high: the gate on
    `pi / pi_rollout`; a token outside contributes 0 but stays in the denominator.
    """

    teacher_logprob: Tensor
    rollout_logprob: Tensor
    ratio_low: float = 0.5
    ratio_high: float = 2.0

    def token_loss(self, logprob: Tensor) -> Tensor:
        terms = self._terms(logprob)
        return -self.token_weight * terms.importance * terms.advantage * logprob

    def metrics(self, logprob: Tensor) -> dict[str, Tensor]:
        advantage, ratio, _ = self._terms(logprob)
        return {
            "advantage": advantage,
            "advantage_abs": advantage.abs(),
            "ratio": ratio,
            "gated_low": (ratio < self.ratio_low).to(ratio.dtype),
            "gated_high": (ratio > self.ratio_high).to(ratio.dtype),
        }

    def _terms(self, logprob: Tensor) -> MopdTerms:
        return mopd_terms(
            self.teacher_logprob, logprob, self.rollout_logprob, self.ratio_low, self.ratio_high
        )


class FusedRow(NamedTuple):
    """An objective for fused kernels: a twin by name, with two per-token constants (None: unused)
    and two settings."""

    twin: str
    a: Tensor | None = None
    b: Tensor | None = None
    x: float = 0.0
    y: float = 0.0


def fused_row(objective: Objective) -> FusedRow | None:
    """The twin of an objective; None if it has none.

    A subclass has no twin: it may compute something else than its base.
    """
    if type(objective) is Nll:
        return FusedRow("nll")
    if type(objective) is Grpo and objective.kl_coef == 0:
        return FusedRow("grpo", objective.advantage)
    if type(objective) is Grpo:
        clamps = (objective.kl_input_clamp, objective.kl_output_clamp)
        if objective.kl_importance == "rollout" or clamps != (None, None):
            return None
        weighted = float(objective.kl_importance == "policy")
        return FusedRow(
            "grpo_kl", objective.advantage, objective.ref_logprob, objective.kl_coef, weighted
        )
    if type(objective) is Mopd:
        teacher, rollout = objective.teacher_logprob, objective.rollout_logprob
        return FusedRow("mopd", teacher, rollout, objective.ratio_low, objective.ratio_high)
    return None
