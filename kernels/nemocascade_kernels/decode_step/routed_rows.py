"""Rows of a step with their experts in one buffer, which ranks exchange in one collective."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes that parts of a row are aligned to: sixteen elements, which Triton looks for in a stride.
_ALIGNED = 64


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """Normed rows of a mixture of experts, and their choices.

    buffer: [n, B] bytes. width, dtype: of the rows. top_k: choices of a row. first, count: only the
    choices of the rows [first, first + count) are used.
    """

    buffer: Tensor
    width: int
    dtype: torch.dtype
    top_k: int
    first: int
    count: int

    @classmethod
    def empty(
        cls, rows: int, width: int, dtype: torch.dtype, top_k: int, device: torch.device
    ) -> RoutedRows:
        """Without values."""
        size = _aligned(width * dtype.itemsize) + _aligned(8 * top_k)
        buffer = torch.empty(rows, size, dtype=torch.uint8, device=device)
        return cls(buffer, width, dtype, top_k, 0, rows)

    @property
    def x(self) -> Tensor:
        """[n, width] in `dtype`."""
        return self.buffer[:, : self.width * self.dtype.itemsize].view(self.dtype)

    @property
    def chosen(self) -> Tensor:
        """[n, top_k] int32, the experts; the number of all experts means none."""
        return self._choices(0).view(torch.int32)

    @property
    def weights(self) -> Tensor:
        """[n, top_k] float32, of the chosen experts; 0 for none."""
        return self._choices(1).view(torch.float32)

    def gathered(self, buffer: Tensor, first: int, count: int) -> RoutedRows:
        """The rows of several ranks, of which the choices of `count` rows are used."""
        return replace(self, buffer=buffer, first=first, count=count)

    def _choices(self, part: int) -> Tensor:
        first = _aligned(self.width * self.dtype.itemsize) + part * 4 * self.top_k
        return self.buffer[:, first : first + 4 * self.top_k]


class SharedExpert(NamedTuple):
    """An expert that the rows [first, first + rows) of a step use without a choice.

    up: [J, H], or [2 J, H] for "swiglu" (the gate's rows first). down: [H, J].
    """

    up: Tensor
    down: Tensor
    first: int
    rows: int


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
