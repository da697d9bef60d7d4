"""Group-relative advantages from rewards (Eq. 1 of Nemotron-Cascade 2), and loss weights."""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade.recipe.grpo import GrpoConfig
from nemocascade.recipe.rl import RolloutConfig


def group_advantages(rewards: Tensor, valid: Tensor, settings: GrpoConfig) -> Tensor:
    """`A_i = (r_i - mean(r)) / (std(r) + epsilon)` over a prompt's rollouts (arXiv 2603.19220).

    rewards: [P, G] float. valid: [P, G] bool, False where the verifier failed; the reward there is
    ignored. Mean and standard deviation are over a group's valid rewards, or with `leave_one_out`
    over the others of them. Where the deviation is 0 the advantage is not divided.

    Returns [P, G] float64: 0 where not valid, and 0 for the whole group if its valid rewards are
    all equal or fewer than two.
    """
    rewards = torch.where(valid, rewards.double(), 0.0)
    mean, deviation = _group_statistics(rewards, valid, settings)
    advantage = torch.where(valid, rewards - mean, 0.0)
    if settings.scale_by_std:
        scaled = advantage / (deviation + settings.std_epsilon)
        advantage = torch.where(deviation > 0, scaled, advantage)
    return torch.where(is_informative(rewards, valid)[:, None], advantage, 0.0)


def _group_statistics(
    rewards: Tensor, valid: Tensor, settings: GrpoConfig
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that each reward is compared with: [P, 1] float64, or [P, G] with
    `leave_one_out`. rewards: [P, G] float64, 0 where not valid.

    The deviation of equal rewards is exactly 0.
    """
    # [P, 1 or G, G]: the rewards that a reward is compared with.
    peers = valid[:, None]
    if settings.leave_one_out:
        peers = peers & ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    each = rewards[:, None].expand(peers.shape)
    count = peers.sum(2).double()
    mean = torch.where(peers, each, 0.0).sum(2) / count.clamp(min=1)
    centred = torch.where(peers, each - mean[..., None], 0.0)
    freedom = (count - 1 if settings.unbiased_std else count).clamp(min=1)
    deviation = (centred.square().sum(2) / freedom).sqrt()
    low = torch.where(peers, each, torch.inf).amin(2)
    high = torch.where(peers, each, -torch.inf).amax(2)
    return mean, torch.where(high > low, deviation, 0.0)


def is_informative(rewards: Tensor, valid: Tensor) -> Tensor:
    """[P] bool: True if a group's valid rewards differ, so that it carries a training signal.

    Rewards are compared directly: the standard deviation of equal rewards need not round to 0.
    """
    low = torch.where(valid, rewards.double(), torch.inf).amin(1)
    high = torch.where(valid, rewards.double(), -torch.inf).amax(1)
    return high > low


def overlong_penalty(length: int, settings: RolloutConfig) -> float:
    """Penalty on the reward of a response of `length` tokens (DAPO, arXiv 2503.14476, Eq. 13).

    0 up to `max_response_tokens - overlong_buffer`, then linear to `overlong_penalty` at the limit.
    """
    limit, buffer = settings.max_response_tokens, settings.overlong_buffer
    if buffer == 0:
        return settings.overlong_penalty if length >= limit else 0.0
    share = (length - (limit - buffer)) / buffer
    return settings.overlong_penalty * min(1.0, max(0.0, share))


def token_weights(lengths: Tensor, groups: Tensor, settings: GrpoConfig) -> Tensor:
    """[N] float64: weight of each trained token of a sequence; the trainer divides by their sum.

    lengths: [N], number of trained tokens of each training sequence. groups: [N] int64, its prompt.
    `normalize` "batch": all tokens weigh the same. "group": the tokens of a prompt weigh 1 in
    total. "sequence": the tokens of a sequence weigh 1 in total.
    """
    lengths = lengths.double()
    if settings.normalize == "batch":
        return torch.ones_like(lengths)
    if settings.normalize == "sequence":
        return 1.0 / lengths.clamp(min=1)
    prompts, inverse = torch.unique(groups, return_inverse=True)
    total = torch.zeros(prompts.numel(), dtype=torch.float64).index_add_(0, inverse, lengths)
    return 1.0 / total[inverse].clamp(min=1)
