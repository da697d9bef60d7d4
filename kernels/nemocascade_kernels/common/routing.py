"""A router's settings and its result, `Routing`, and the choice of experts in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The experts of every token, and the same slots sorted by expert.

    A slot is one (token, choice) pair; slot `t * K + k` is choice k of token t. A token that
    `token_mask` excludes has no expert: its `experts` are E, its `weights` are 0, `counts` exclude
    it, and its slots are at the end of `order`, past `offsets[E]`.

    weights: [T, K] float32, differentiable.
    experts: [T, K] int32, by decreasing (biased) score; among equal scores the lower expert id
        comes first.
    counts: [E] int32, slots of each expert.
    order: [T * K] int32, slots sorted by expert; slots of one expert stay in increasing order.
    offsets: [E + 1] int32: slots of expert e are `order[offsets[e]:offsets[e + 1]]`.
    positions: [T, K] int32, the inverse of `order`: `order[positions[t, k]] == t * K + k`.
    """

    weights: Tensor
    experts: Tensor
    counts: Tensor
    order: Tensor
    offsets: Tensor
    positions: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens T."""
        return self.experts.shape[0]

    @property
    def top_k(self) -> int:
        """Choices of a token, K."""
        return self.experts.shape[1]

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return self.counts.shape[0]

    def truncated(self, filled: int) -> Routing:
        """The same routing for rows of which only the first `filled` exist, and one of padding.

        filled: offsets[E], known on the host. `order` has min(filled + 1, T * K) entries, and so
        have the rows of `moe_permute` and `moe_unpermute`; slots without an expert share the last
        one. Their gradients in `weights` are undefined.
        """
        positions = self.positions.clamp(max=filled)
        return replace(self, order=self.order[: filled + 1], positions=positions)


@dataclass(frozen=True)
class RouterSettings:
    """The settings of one `moe_route` call, passed to its implementations."""

    top_k: int
    score: str
    num_groups: int
    top_groups: int
    normalize: bool
    scale: float


#: Added to the sum of the chosen scores before the division, as Megatron-Core and Hugging Face do.
NORMALIZE_EPSILON = 1e-20

#: The score of a group is the sum of this many of its best biased scores (DeepSeek-V3).
SCORES_PER_GROUP = 2


def scores_of(logits: Tensor, score: str) -> Tensor:
    """Scores [T, E] in float32 (float64 for float64 logits)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.sigmoid() if score == "sigmoid" else wide.softmax(dim=-1)


def select(scores: Tensor, expert_bias: Tensor | None, settings: RouterSettings) -> Tensor:
    """Experts [T, K] int64 of the highest biased scores; among equals, the lower id comes first."""
    biased = scores if expert_bias is None else scores + expert_bias.to(scores.dtype)
    if settings.num_groups > 1:
        biased = _without_other_groups(biased, settings.num_groups, settings.top_groups)
    ranked = torch.sort(biased, dim=-1, descending=True, stable=True).indices
    return ranked[:, : settings.top_k]


def _without_other_groups(biased: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """Set scores outside each token's best groups to -inf."""
    tokens, experts = biased.shape
    grouped = biased.view(tokens, num_groups, experts // num_groups)
    best = grouped.sort(dim=-1, descending=True).values[..., :SCORES_PER_GROUP]
    ranked = torch.sort(best.sum(dim=-1), dim=-1, descending=True, stable=True).indices
    kept = torch.zeros(tokens, num_groups, dtype=torch.bool, device=biased.device)
    kept.scatter_(1, ranked[:, :top_groups], True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).view(tokens, experts)


def choose_experts(
    logits: Tensor,
    expert_bias: Tensor | None,
    token_mask: Tensor | None,
    experts: Tensor | None,
    settings: RouterSettings,
) -> tuple[Tensor, Tensor]:
    """Definition of the choice: weights [T, K], differentiable in logits, and experts [T, K].

    See `nemocascade_kernels.moe_route` for the equations and the arguments.
    """
    num_experts = logits.shape[1]
    if token_mask is not None:
        # A masked token may hold any value, including NaN.
        logits = logits.masked_fill(~token_mask.unsqueeze(1), 0.0)
    scores = scores_of(logits, settings.score)
    chosen = select(scores.detach(), expert_bias, settings) if experts is None else experts.long()
    absent = chosen >= num_experts
    if token_mask is not None:
        absent = absent | ~token_mask.unsqueeze(1)
    weights = scores.gather(1, chosen.masked_fill(absent, 0)).masked_fill(absent, 0.0)
    if settings.normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + NORMALIZE_EPSILON)
    return weights * settings.scale, chosen.masked_fill(absent, num_experts)
