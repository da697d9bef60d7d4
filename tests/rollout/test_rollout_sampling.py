"""Random numbers by seed, request and position."""

from __future__ import annotations

import torch

from nemocascade.rollout.sampling import request_keys, uniforms


def numbers(seed: int, requests: int, positions: int) -> torch.Tensor:
    """[requests, positions]."""
    keys = request_keys(seed, torch.arange(requests))
    return torch.stack([uniforms(keys, torch.full_like(keys, p)) for p in range(positions)], 1)


def test_numbers_depend_on_seed_request_and_position_alone() -> None:
    table = numbers(3, 40, 50)
    assert torch.equal(numbers(3, 5, 50), table[:5])
    assert table.unique().numel() == table.numel()
    assert not torch.isin(numbers(4, 40, 50), table).any()
    # Large seeds and ids are numbers like others.
    wide = uniforms(request_keys(2**63 + 5, torch.tensor([2**62, -1])), torch.tensor([0, 2**40]))
    assert ((wide >= 0) & (wide < 1)).all()


def test_numbers_are_uniform_and_unrelated() -> None:
    table = numbers(0, 300, 300)
    assert ((table >= 0) & (table < 1)).all()
    share = torch.histc(table.float(), bins=50, min=0, max=1) / table.numel()
    assert float((share - 0.02).abs().max()) < 0.003
    centred = (table - 0.5) * 12**0.5
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs(float((a * b).mean())) < 0.015
