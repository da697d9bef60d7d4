"""`mopd_advantage`: checks and choice of the implementation. Nothing here has a gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemocascade_kernels import backends
from nemocascade_kernels.mopd_advantage.reference import METRICS

OP = backends.Op("mopd_advantage")
OP.register("triton")
OP.register("reference")


class MopdAdvantage(NamedTuple):
    """Result: advantage [T] and importance [T] float32, without a gradient."""

    advantage: Tensor
    importance: Tensor


def mopd_advantage(
    teacher_logprob: Tensor,
    train_logprob: Tensor,
    rollout_logprob: Tensor,
    *,
    ratio_low: float = 0.5,
    ratio_high: float = 2.0,
    backend: str | None = None,
) -> MopdAdvantage:
    """Advantage and importance weight of distillation for each token (Nemotron-Cascade 2, Eq. 2-3).

    `a_t = log pi_teacher - log pi_train`; `w_t = r_t` if `ratio_low <= r_t <= ratio_high` and 0
    otherwise (not clamped), with `r_t = pi_train / pi_rollout`. Eq. 4 applies a stop-gradient to
    both.

    teacher_logprob, train_logprob, rollout_logprob: [T] float32, of the sampled token.
    backend: require an implementation; see `nemocascade_kernels.backends`.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    tensors = {
        "teacher_logprob": teacher_logprob,
        "train_logprob": train_logprob,
        "rollout_logprob": rollout_logprob,
    }
    _check(tensors, ratio_low, ratio_high)
    module = OP.choose(*tensors.values(), backend=backend)
    detached = [tensor.detach() for tensor in tensors.values()]
    return MopdAdvantage(*module.mopd_advantage(*detached, ratio_low, ratio_high))


def mopd_advantage_metrics(
    teacher_logprob: Tensor,
    train_logprob: Tensor,
    rollout_logprob: Tensor,
    token_weight: Tensor,
    *,
    ratio_low: float = 0.5,
    ratio_high: float = 2.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`mopd_advantage` and its metrics for a training step, in one launch.

    token_weight: [T] float32; mask and normaliser in one, which includes the mean by sequence of
        Eq. 4. Where it is 0, advantage and importance are 0 and the other inputs are ignored.

    Returns advantage [T], importance [T], and scalars float32 on the device: `loss`, the sum
    `-sum_t weight_t w_t a_t log pi_train` of Eq. 4; `tokens`, the number of counted tokens; and the
    means over them of `advantage`, `advantage_abs` and `ratio`, and the fractions below
    (`gated_low`) and above (`gated_high`) the gate.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    tensors = {
        "teacher_logprob": teacher_logprob,
        "train_logprob": train_logprob,
        "rollout_logprob": rollout_logprob,
        "token_weight": token_weight,
    }
    _check(tensors, ratio_low, ratio_high)
    module = OP.choose(*tensors.values(), backend=backend)
    detached = [tensor.detach() for tensor in tensors.values()]
    advantage, importance, found = module.mopd_advantage_metrics(*detached, ratio_low, ratio_high)
    return advantage, importance, dict(zip(METRICS, found.unbind(), strict=True))


def _check(tensors: dict[str, Tensor], ratio_low: float, ratio_high: float) -> None:
    if not 0 <= ratio_low <= ratio_high:
        raise ValueError(f"need 0 <= ratio_low({ratio_low}) <= ratio_high({ratio_high})")
    first = next(iter(tensors.values()))
    if first.dim() != 1 or any(
        tensor.shape != first.shape
        or tensor.dtype != torch.float32
        or tensor.device != first.device
        for tensor in tensors.values()
    ):
        given = ", ".join(
            f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device}"
            for name, tensor in tensors.items()
        )
        raise ValueError(f"all must be [T] float32 on one device. Got {given}")
