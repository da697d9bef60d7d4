"""Counter-based random numbers: a function of a key and a position.

Shape letter: n rows.
"""

from __future__ import annotations

from torch import Tensor

#: Constants of splitmix64's finaliser (Stafford's variant 13) and its step, as signed integers.
STEP = -7046029254386353131
FIRST, SECOND = -4658895280553007687, -7723592293110705685


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """[n] float64 in [0, 1): the random number of each position, 53 bits of a counter's hash.

    keys, positions: [n] int64.
    """
    bits = mix(keys + (positions + 1) * STEP)
    return _shift(bits, 11).double() * 2.0**-53


def mix(z: Tensor) -> Tensor:
    """Finaliser of splitmix64 on 64-bit integers, with wrap-around."""
    z = (z ^ _shift(z, 30)) * FIRST
    z = (z ^ _shift(z, 27)) * SECOND
    return z ^ _shift(z, 31)


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical right shift, filling with zeros."""
    return (z >> by) & ((1 << (64 - by)) - 1)
