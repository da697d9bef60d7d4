"""Random numbers by seed, request and position."""

from __future__ import annotations

import torch
from nemocascade_kernels.common.random_numbers import uniforms

from nemocascade.rollout.sampling import request_keys


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


def test_keys_and_random_numbers_are_those_of_splitmix64() -> None:
    """By its published constants, in Python's whole numbers: a seed's draws are kept for ever."""
    low = 2**64 - 1

    def mixed(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & low
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & low
        return z ^ (z >> 31)

    step, seed, ids, positions = 0x9E3779B97F4A7C15, 2**63 + 5, [0, 1, 77], [0, 3, 2**20]
    expected = [mixed(mixed((seed + step) & low) + i * step & low) for i in ids]
    keys = request_keys(seed, torch.tensor(ids))
    assert [k % 2**64 for k in keys.tolist()] == expected
    drawn = uniforms(keys, torch.tensor(positions)).tolist()
    assert drawn == [
        (mixed(k + (p + 1) * step & low) >> 11) * 2.0**-53
        for k, p in zip(expected, positions, strict=True)
    ]
