"""Sizes and random inputs of the op `mamba2`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from nemocascade_kernels import PackedSeq, mamba2
from nemocascade_kernels.mamba2.arguments import Inputs
from torch import Tensor

from helpers.layers import draw

NAMES = ["out", "zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A", "D", "norm_weight"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a mixer, and the rows of its convolution's window."""

    heads: int
    head_dim: int
    groups: int
    state: int
    window: int = 4
    dt_limit: tuple[float, float] = (0.0, math.inf)

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.groups * self.state

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `mamba2`."""
        return {name: value for name, value in asdict(self).items() if name != "window"}

    def inputs(self, rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """The seven tensors, of numbers that float32 can hold."""
        tensors = [
            draw(rows, self.inner + self.channels + self.heads),
            draw(self.channels, self.window) / 2,
            draw(self.channels, seed=1) / 4,
            draw(self.heads) - 1,
            -draw(self.heads, seed=1).exp(),
            draw(self.heads, seed=2),
            draw(self.inner),
        ]
        return [t.to(dtype) for t in tensors]

    def upstream(self, rows: int) -> Tensor:
        return draw(rows, self.inner, seed=9)

    def run(self, inputs: list[Tensor], packed: PackedSeq, backend: str | None) -> Tensor:
        """The output alone."""
        return mamba2(*Inputs(*inputs), packed, **self.settings, backend=backend)[0]
