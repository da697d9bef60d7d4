"""Random numbers by seed, request and position; tokens allowed by top-k and top-p."""

from __future__ import annotations

import torch

from nemocascade.rollout.engine import Sampling
from nemocascade.rollout.sampling import allowed_tokens, request_keys, uniforms


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


def test_top_k_and_top_p() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2], [0.2, 0.2, 0.2, 0.2, 0.2]]).log()

    def left(vocabulary: int = 5, **settings: float) -> list[list[int]]:
        allowed = allowed_tokens(logits, Sampling(**settings), vocabulary)  # type: ignore[arg-type]
        assert allowed is not None
        return [torch.nonzero(row)[:, 0].tolist() for row in allowed]

    assert allowed_tokens(logits, Sampling(), 5) is None
    assert allowed_tokens(logits, Sampling(temperature=0, top_k=1), 5) is None
    assert left(top_k=2) == [[1, 3], [0, 1]]
    assert left(top_k=9) == [[0, 1, 2, 3, 4]] * 2
    # 0.4 does not reach 0.5; with 0.25 it does.
    assert left(top_p=0.5) == [[1, 3], [0, 1, 2]]
    assert left(top_p=1e-6) == [[1], [0]]
    # Of the two that top-k leaves, the first holds 0.4 / 0.65.
    assert left(top_k=2, top_p=0.6) == [[1], [0, 1]]
    # A lower temperature sharpens: 0.4^4 is most of the sum.
    assert left(temperature=0.25, top_p=0.7)[0] == [1]
    assert left(vocabulary=3, top_k=2) == [[0, 1], [0, 1]]
