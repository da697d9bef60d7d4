"""Repeated text of a response, as every rank knows it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemocascade.rl import exchange
from nemocascade.rl.rollouts import TokenSequence, repeated_share, whole_rollout
from nemocascade.types import Verdict


def test_the_share_of_repeated_runs() -> None:
    assert repeated_share(torch.arange(500)) == 0.0
    assert repeated_share(torch.tensor([7, 7, 7])) == 0.0
    assert repeated_share(torch.full((104,), 7)) == pytest.approx(100 / 101)
    # 40 new tokens, then the same again: 37 of the 77 runs were there before.
    assert repeated_share(torch.arange(40).repeat(2)) == pytest.approx(37 / 77)
    assert repeated_share(torch.empty(0, dtype=torch.int64)) == 0.0


def test_large_token_ids_do_not_collide() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(250_000, 256_000, (4096,), generator=generator)
    assert repeated_share(tokens) == 0.0


def test_the_prompt_does_not_count_and_other_ranks_get_the_share() -> None:
    tokens = torch.cat([torch.full((50,), 3), torch.arange(10, 30), torch.arange(10, 30)])
    written = torch.arange(90) >= 50
    sequence = TokenSequence(tokens, written, torch.zeros(90))
    rollout = whole_rollout(sequence, Verdict(0.5), domain="math", text="")
    assert rollout.repetition == pytest.approx(17 / 37)
    row = np.array(exchange._row(rollout, rank=1), dtype=np.int64)
    assert row.nbytes == exchange.OUTCOME_BYTES
    received = exchange._outcome(row)
    assert received.repetition == rollout.repetition
    assert received.verdict.reward == 0.5
