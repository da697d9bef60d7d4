"""Counter-based random numbers, a function of seed, request and position; top-k and top-p masks.

Shape letters: n rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade.rollout.engine import Sampling

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


def allowed_tokens(logits: Tensor, sampling: Sampling, vocabulary: int) -> Tensor | None:
    """[n, V] bool mask of the ids that top-k and top-p allow; None if all are allowed.

    logits: [n, V]. vocabulary: ids from here on are never drawn, so they are ignored.
    Probabilities are at the sampling temperature; top-p applies to what top-k kept, renormalised.
    Among equal probabilities the lower id is kept first. The token that reaches p is kept.
    """
    if sampling.temperature == 0 or (not sampling.top_k and sampling.top_p >= 1):
        return None
    scaled = logits[:, :vocabulary].float() / sampling.temperature
    ranked, order = scaled.softmax(1).sort(dim=1, descending=True, stable=True)
    kept = torch.ones_like(ranked, dtype=torch.bool)
    if sampling.top_k:
        kept[:, sampling.top_k :] = False
        ranked = ranked.masked_fill(~kept, 0)
    if sampling.top_p < 1:
        sums = ranked.cumsum(1, dtype=torch.float64)
        kept &= sums - ranked < sampling.top_p * sums[:, -1:]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, kept)


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
