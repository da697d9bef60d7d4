"""The activations of experts, in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("relu2", "swiglu")


def activate(h: Tensor, activation: str) -> Tensor:
    """Return relu(h)^2, or silu(gate) * up with h = [gate, up] in the last dimension."""
    if activation == "relu2":
        return F.relu(h).square()
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up
