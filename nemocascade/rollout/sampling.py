"""Random numbers that depend on seed, request and position alone, and the draw of a token.

Shape letters: n rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade.rollout.engine import Sampling

# Constants of splitmix64's finaliser (Stafford's variant 13) and its step, as signed integers.
_STEP = -7046029254386353131
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685
# Probabilities are added up in stretches of this many first.
_STRETCH = 128
_MARGIN = 2.0**-40


def request_keys(seed: int, ids: Tensor) -> Tensor:
    """[n] int64: the key of each request's random numbers. ids: [n] int64."""
    start = _mix(torch.full_like(ids, _signed(seed)) + _STEP)
    return _mix(start + ids * _STEP)


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """[n] float64 in [0, 1), the random number of each position: 53 bits of a counter's hash.

    keys: [n], of `request_keys`; positions: [n] int64.
    """
    bits = _mix(keys + (positions + 1) * _STEP)
    return _shift(bits, 11).double() * 2.0**-53


def draw(logits: Tensor, u: Tensor, sampling: Sampling, vocabulary: int) -> tuple[Tensor, Tensor]:
    """A token a row and its log-probability, by inverting the cumulative distribution at u.

    logits: [n, V] floating point. u: [n] float64 in [0, 1). vocabulary: ids from here on are never
    drawn (rows of the head without a token); V excludes none.
    Returns tokens [n] int64, and their log-probabilities [n] float32 under softmax(logits /
    temperature) over all of V, whatever was truncated; at temperature 0 under softmax(logits).
    """
    temperature = sampling.temperature
    scaled = logits.float()
    if temperature not in (0.0, 1.0):
        scaled = scaled / temperature
    logprobs = torch.log_softmax(scaled, dim=1)
    allowed = logprobs if vocabulary >= logits.shape[1] else logprobs[:, :vocabulary]
    if temperature == 0.0:
        tokens = allowed.argmax(1)
    else:
        weights = allowed.exp()
        if sampling.top_k or sampling.top_p < 1:
            weights = _truncate(weights, sampling.top_k, sampling.top_p)
        tokens = _invert(weights, u)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def _truncate(weights: Tensor, top_k: int, top_p: float) -> Tensor:
    """The weights [n, V] with zeros outside the top k and, of those, the top p.

    Of equal weights the lower id is kept first. The token that reaches p is kept.
    """
    ranked, order = weights.sort(dim=1, descending=True, stable=True)
    if top_k:
        ranked[:, top_k:] = 0
    if top_p < 1:
        sums = ranked.cumsum(1, dtype=torch.float64)
        before = sums - ranked
        ranked = ranked.masked_fill(before >= top_p * sums[:, -1:], 0)
    return torch.zeros_like(weights).scatter_(1, order, ranked)


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """[n]: the first id at which the sum of weights [n, V] exceeds u times their total.

    In two levels, because the sums of stretches are cheaper than all partial sums.
    """
    rows, width = weights.shape
    padded = torch.nn.functional.pad(weights, (0, -width % _STRETCH))
    stretches = padded.view(rows, -1, _STRETCH)
    sums = stretches.sum(2, dtype=torch.float64).cumsum(1)
    # Below the total whatever the rounding, so that a weight above zero is found.
    target = u[:, None] * sums[:, -1:] * (1 - _MARGIN)
    at = _first_above(sums, target)
    before = torch.where(at > 0, sums.gather(1, (at - 1).clamp_(min=0)), 0.0)
    inside = stretches.gather(1, at[:, :, None].expand(-1, -1, _STRETCH)).squeeze(1)
    partial = inside.cumsum(1, dtype=torch.float64)
    target = torch.minimum(target - before, partial[:, -1:] * (1 - _MARGIN))
    # Weights that are not finite lead anywhere; their log-probability tells the caller.
    return (at * _STRETCH + _first_above(partial, target)).squeeze(1).clamp_(max=width - 1)


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """[n, 1]: the first index at which rising sums [n, m] exceed target [n, 1]."""
    return torch.searchsorted(sums, target, right=True).clamp_(max=sums.shape[1] - 1)


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser on 64-bit integers, which wrap."""
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    return z ^ _shift(z, 31)


def _shift(z: Tensor, by: int) -> Tensor:
    """Right, filling with zeros."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The lowest 64 bits as a signed integer."""
    return (value + 2**63) % 2**64 - 2**63
