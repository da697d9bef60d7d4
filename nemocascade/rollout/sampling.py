"""Keys of the random numbers that draw tokens: a function of seed and request.

Shape letter: n rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade.megatron.generation import STEP, mix


def request_keys(seed: int, ids: Tensor) -> Tensor:
    """[n] int64: the key of each request's random numbers. ids: [n] int64."""
    start = mix(torch.full_like(ids, _signed(seed)) + STEP)
    return mix(start + ids * STEP)


def _signed(value: int) -> int:
    """The lowest 64 bits as a signed integer."""
    return (value + 2**63) % 2**64 - 2**63
