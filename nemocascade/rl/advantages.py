"""Rewards become advantages: group by group, as Eq. 1 of Nemotron-Cascade 2 has them."""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade.recipe.rl import GrpoConfig, RolloutConfig


def group_advantages(rewards: Tensor, valid: Tensor, settings: GrpoConfig) -> Tensor:
    """`A_i = (r_i - mean(r)) / (std(r) + epsilon)` over a prompt's rollouts (arXiv 2603.19220).

    rewards: [P, G] float; valid: [P, G] bool, False where the verifier failed, whose reward is not
    read. Mean and deviation are over a group's valid rewards.

    Returns [P, G] float64: 0 where not valid, and 0 for all of a group whose valid rewards are
    equal or fewer than two.
    """
    rewards = torch.where(valid, rewards.double(), 0.0)
    count = valid.sum(1, keepdim=True).double()
    mean = rewards.sum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(valid, rewards - mean, 0.0)
    # r_i less the mean of the others = (r_i - mean) n / (n - 1)
    others = count / (count - 1).clamp(min=1)
    advantage = centred * others if settings.leave_one_out else centred
    if settings.scale_by_std:
        freedom = count - 1 if settings.unbiased_std else count
        variance = centred.square().sum(1, keepdim=True) / freedom.clamp(min=1)
        advantage = advantage / (variance.sqrt() + settings.std_epsilon)
    return torch.where(is_informative(rewards, valid)[:, None], advantage, 0.0)


def is_informative(rewards: Tensor, valid: Tensor) -> Tensor:
    """[P] bool: whether a group's valid rewards differ, so that it can teach anything.

    Compared as they are: the deviation of equal rewards need not round to 0.
    """
    low = torch.where(valid, rewards.double(), torch.inf).amin(1)
    high = torch.where(valid, rewards.double(), -torch.inf).amax(1)
    return high > low


def overlong_penalty(length: int, settings: RolloutConfig) -> float:
    """What a response of `length` tokens loses for its length (DAPO, arXiv 2503.14476, Eq. 13).

    0 up to `max_response_tokens - overlong_buffer`, growing to `overlong_penalty` at the limit.
    """
    limit, buffer = settings.max_response_tokens, settings.overlong_buffer
    if buffer == 0:
        return settings.overlong_penalty if length >= limit else 0.0
    share = (length - (limit - buffer)) / buffer
    return settings.overlong_penalty * min(1.0, max(0.0, share))


def token_weights(lengths: Tensor, groups: Tensor, settings: GrpoConfig) -> Tensor:
    """Weight of every trained token of a sequence, [N] float64; the trainer divides by their sum.

    lengths: [N], trained tokens of each sequence that trains; groups: [N] int64, its prompt.
    batch: every token weighs the same. group: a prompt's tokens weigh 1 together. sequence: a
    sequence's tokens do.
    """
    lengths = lengths.double()
    if settings.normalize == "batch":
        return torch.ones_like(lengths)
    if settings.normalize == "sequence":
        return 1.0 / lengths.clamp(min=1)
    prompts, inverse = torch.unique(groups, return_inverse=True)
    total = torch.zeros(prompts.numel(), dtype=torch.float64).index_add_(0, inverse, lengths)
    return 1.0 / total[inverse].clamp(min=1)
