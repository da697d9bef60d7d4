"""Row kernels of the policy loss in C++ for the CPU (csrc/linear_policy_loss/).

`fused_rows` does statistics, objective and gradient of a row while it is in the cache, with one
exponential an element. It knows the objectives of `ROWS`; others take the two row kernels of
linear_logprob/native.py, with torch between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemocascade_kernels import native
from nemocascade_kernels.linear_logprob.native import (
    add_product,
    adds_products,
    gradient_,
    statistics,
)
from nemocascade_kernels.linear_policy_loss.objectives import Grpo, Mopd, Nll, Objective

__all__ = ["add_product", "adds_products", "fused_rows", "fuses", "gradient_", "statistics"]


class Row(NamedTuple):
    """An objective of the kernel by number, with two per-token constants and two settings."""

    kind: int
    a: Tensor | None = None
    b: Tensor | None = None
    x: float = 0.0
    y: float = 0.0


def _grpo(objective: Grpo) -> Row:
    if objective.kl_coef == 0:
        return Row(1, objective.advantage)
    return Row(2, objective.advantage, objective.ref_logprob, objective.kl_coef)


#: Objectives that the kernel knows. A subclass is not its base: it may compute something else.
ROWS: dict[type[Objective], Callable[[Any], Row]] = {
    Nll: lambda _: Row(0),
    Grpo: _grpo,
    Mopd: lambda o: Row(3, o.teacher_logprob, o.rollout_logprob, o.ratio_low, o.ratio_high),
}


def fuses(objective: Objective) -> bool:
    """Whether `fused_rows` takes this objective."""
    return type(objective) in ROWS


def fused_rows(
    logits: Tensor,
    target: Tensor,
    scale: float,
    objective: Objective,
    grad_scale: float,
    filled: Tensor,
    first_slot: int,
    entropy: bool,
    gradient: bool,
) -> Tensor:
    """Loss, log-probability and entropy of each row, [3, R] float32; logits become the gradient.

    logits: [R, V] float32 or bfloat16; target: [R] int64. objective: its fields are [R]. The rows
    of a CPU are counted beforehand, so all R count: filled and first_slot are not needed.
    gradient: False leaves the logits.
    """
    row = ROWS[type(objective)](objective)
    weight = objective.token_weight
    out = torch.empty(3, logits.shape[0])
    native.op("policy_rows_")(
        logits,
        target,
        scale,
        row.kind,
        weight,
        weight if row.a is None else row.a,
        weight if row.b is None else row.b,
        row.x,
        row.y,
        grad_scale,
        entropy,
        gradient,
        out,
    )
    return out
