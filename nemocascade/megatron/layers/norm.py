"""RMSNorm as a layer: the parameter of the op `rms_norm`."""

from __future__ import annotations

from typing import Any

import torch
from nemocascade_kernels import rms_norm
from torch import Tensor

from nemocascade.megatron.config import CascadeConfig


class RMSNorm(torch.nn.Module):
    """`y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension (arXiv 1910.07467).

    The weight carries `sequence_parallel`, so that Megatron sums its gradient over the
    tensor-parallel ranks, each of which sees only its part of the sequence.
    """

    def __init__(
        self, config: CascadeConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., hidden_size]. Returns the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)
