"""Counter-based random numbers, a function of seed, request and position.

Shape letter: n rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Constants of splitmix64's finaliser (Stafford's variant 13) and its step, as signed integers.
_STEP = -7046029254386353131
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685


def request_keys(seed: int, ids: Tensor) -> Tensor:
    """[n] int64: the key of each request's random numbers. ids: [n] int64."""
    start = _mix(torch.full_like(ids, _signed(seed)) + _STEP)
    return _mix(start + ids * _STEP)


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """[n] float64 in [0, 1): the random number of each position, 53 bits of a counter's hash.

    keys: [n], from `request_keys`. positions: [n] int64.
    """
    bits = _mix(keys + (positions + 1) * _STEP)
    return _shift(bits, 11).double() * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    """Finaliser of splitmix64 on 64-bit integers, with wrap-around."""
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    return z ^ _shift(z, 31)


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical right shift, filling with zeros."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The lowest 64 bits as a signed integer."""
    return (value + 2**63) % 2**64 - 2**63
