"""Settings of GRPO's advantages and loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from nemocascade.recipe.rules import NonNegative, Positive, Range, Tokens


@dataclass(frozen=True)
class GrpoConfig:
    """Advantages and loss (Nemotron-Cascade 2, arXiv 2603.19220, Eq. 1)."""

    normalize: Literal["batch", "group", "sequence"] = "batch"
    """Normalisation of the loss: by all trained tokens of the step, by those of a prompt's group
    with equal weight per group, or by those of a sequence with equal weight per sequence."""

    std_epsilon: Positive = 1e-6
    """Added to the standard deviation of a group's rewards."""

    scale_by_std: bool = True
    """Divide a group's advantages by the standard deviation of its rewards."""

    unbiased_std: bool = True
    """Divide by the number of rewards minus one in the variance, not by their number."""

    leave_one_out: bool = False
    """Mean and standard deviation of the group's other rewards, not of all. A reward whose others
    are all equal is not divided by their deviation, which is 0."""

    kl_coef: NonNegative = 0.0
    """Weight of the k3 estimate of KL(pi || pi_start); 0 = no reference policy is stored."""

    kl_importance: Literal["policy", "rollout", "none"] = "policy"
    """Importance weight of the estimate. `policy`: pi / sg[pi], which is 1; its gradient makes that
    of the estimate log pi - log pi_start, unbiased for the KL. `rollout`: pi / pi_rollout. `none`:
    no weight; the gradient is that of k3 alone, 1 - pi_start / pi."""

    kl_input_clamp: Annotated[float | None, Range(0, open_low=True)] = None
    """Clamp |log pi_start - log pi| in the estimate; a clamped token has no gradient of it. None
    clamps none."""

    kl_output_clamp: Annotated[float | None, Range(0, open_low=True)] = None
    """Upper bound of a token's weighted estimate, without a gradient beyond. None bounds none."""

    capacity: Tokens = 65_536
    """Tokens in one packed sequence (micro-batch) of training."""
