"""Sampling of a token from a row of logits: settings, and the draw as a chain of operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from nemocascade_kernels.common.linear_head.truncation import (
    Truncation,
    kept_log_mass,
    kept_tokens,
)
from nemocascade_kernels.common.random_numbers import uniforms

Draw = Callable[[Tensor, Tensor | None, float, int, Tensor | None], tuple[Tensor, Tensor]]
"""`step_draw` of an implementation: logits, u, temperature, limit, allowed."""


class SampleSettings(NamedTuple):
    """temperature: divides the logits; 0 takes the most probable token, the first of equals. limit:
    ids from this one on are excluded. top_k, top_p: see `Truncation`. truncated_logprobs: of the
    distribution that these leave, renormalised; otherwise of softmax(logits / temperature), and at
    temperature 0 of softmax(logits).
    """

    temperature: float
    limit: int
    top_k: int = 0
    top_p: float = 1.0
    truncated_logprobs: bool = False

    @property
    def truncation(self) -> Truncation | None:
        """None if every token may be drawn. The most probable token is always kept."""
        if not self.temperature or (not self.top_k and self.top_p >= 1):
            return None
        return Truncation(self.top_k, self.top_p, self.limit)


def sampled(
    draw: Draw, logits: Tensor, keys: Tensor, positions: Tensor, s: SampleSettings
) -> tuple[Tensor, Tensor]:
    """`steps.Steps.sample` by an implementation's `draw`."""
    logits, temperature = logits.float(), s.temperature or 1.0
    u = uniforms(keys, positions) if s.temperature else None
    truncation = s.truncation
    if truncation is None:
        return draw(logits, u, temperature, s.limit, None)
    kept = kept_tokens(logits, 1.0 / temperature, truncation)
    tokens, logprobs = draw(logits, u, temperature, s.limit, kept)
    if s.truncated_logprobs:
        logprobs = logprobs - kept_log_mass(logits, 1.0 / temperature, kept)
    return tokens, logprobs
