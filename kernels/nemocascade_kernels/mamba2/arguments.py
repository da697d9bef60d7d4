"""Inputs and sizes of one call of `mamba2`, passed to its implementations.

Shape letters: T tokens, h heads, p head dimension, g groups, n state, K convolution width,
W = h p + 2 g n its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """Tensors with gradients, in the order of `mamba2`'s arguments.

    zxbcdt: [T, h p + W + h]. conv_weight: [W, K]. conv_bias: [W]. dt_bias, A, D: [h].
    norm_weight: [h p].
    """

    zxbcdt: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    norm_weight: Tensor

    @property
    def window(self) -> int:
        """Convolution width K."""
        return self.conv_weight.shape[1]


class States(NamedTuple):
    """States of D documents.

    conv: [D, K - 1, W], the convolution's last inputs, the oldest first; zeros before a document.
    ssm: [D, h, p, n] float32 (float64 for float64 inputs).
    """

    conv: Tensor
    ssm: Tensor

    def spread(self, documents: Sequence[int], count: int) -> States:
        """States of `count` documents: these for `documents`, zeros for the others."""
        place = torch.tensor(documents, device=self.ssm.device)
        return States(*(t.new_zeros(count, *t.shape[1:]).index_copy(0, place, t) for t in self))


@dataclass(frozen=True)
class Sizes:
    """Sizes h, p, g, n; bounds of softplus(dt + dt_bias); eps of the norm."""

    heads: int
    head_dim: int
    groups: int
    state: int
    dt_limit: tuple[float, float]
    eps: float

    @property
    def inner(self) -> int:
        """Inner width h p."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Convolution channels W."""
        return self.inner + 2 * self.groups * self.state

    def split(self, zxbcdt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split into z [T, h p], xBC [T, W] and dt [T, h]."""
        z, xbc, dt = zxbcdt.split([self.inner, self.channels, self.heads], dim=1)
        return z, xbc, dt

    def split_channels(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split into x [T, h, p], B and C [T, g, n]."""
        shared = self.groups * self.state
        x, b, c = xbc.split([self.inner, shared, shared], dim=1)
        return (
            x.unflatten(1, (self.heads, self.head_dim)),
            b.unflatten(1, (self.groups, self.state)),
            c.unflatten(1, (self.groups, self.state)),
        )
