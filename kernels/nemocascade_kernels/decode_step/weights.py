"""The constants of one Mamba-2 mixer for `step_mamba`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class MambaWeights:
    """Parameters between a mixer's two projections; W = h p + 2 g N channels.

    conv_weight: [W, K]. conv_bias: [W]. dt_bias, A (negative), D: [h] float32.
    norm_weight: [h p]. groups: g. dt_limit: bounds of softplus(dt + dt_bias). eps: of the norm.
    """

    conv_weight: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    norm_weight: Tensor
    groups: int
    dt_limit: tuple[float, float]
    eps: float
