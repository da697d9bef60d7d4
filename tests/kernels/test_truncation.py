"""Truncated distributions: the kept tokens, and the policy loss of what they leave."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.heads import (
    BACKENDS,
    DTYPES,
    Head,
    assert_found,
    chunked,
    device_for,
    evaluate,
    factor_for,
    make_head,
    make_objective,
    skip_unless_served,
)
from nemocascade_kernels import (
    Grpo,
    Nll,
    Truncation,
    kept_log_mass,
    kept_tokens,
    linear_policy_loss,
)
from nemocascade_kernels.linear_policy_loss.op import OP

CUT = Truncation(top_k=40, top_p=0.9)


def test_top_k_and_top_p() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2], [0.2, 0.2, 0.2, 0.2, 0.2]]).log()

    def left(scale: float = 1.0, **settings: Any) -> list[list[int]]:
        kept = kept_tokens(logits, scale, Truncation(**settings))
        return [torch.nonzero(row)[:, 0].tolist() for row in kept]

    assert left() == [[0, 1, 2, 3, 4]] * 2
    assert left(top_k=2) == [[1, 3], [0, 1]]
    assert left(top_k=9) == [[0, 1, 2, 3, 4]] * 2
    # 0.4 does not reach 0.5; with 0.25 it does.
    assert left(top_p=0.5) == [[1, 3], [0, 1, 2]]
    assert left(top_p=1e-6) == [[1], [0]]
    # Of the two that top-k leaves, the first holds 0.4 / 0.65.
    assert left(top_k=2, top_p=0.6) == [[1], [0, 1]]
    # A lower temperature sharpens: 0.4^4 is most of the sum.
    assert left(scale=4.0, top_p=0.7)[0] == [1]
    assert left(vocabulary=3, top_k=2) == [[0, 1], [0, 1]]
    mass = kept_log_mass(logits, 1.0, kept_tokens(logits, 1.0, Truncation(top_p=0.5)))
    assert mass.exp().tolist() == pytest.approx([0.65, 0.6])


def by_hand(head: Head, objective: Grpo, truncation: Truncation, temperature: float) -> Any:
    """Loss, log-probabilities and gradients in float64, as NeMo-RL defines them: softmax over the
    kept logits, and no part for a token that is not kept."""
    hidden, weight = head.leaves(torch.float64)
    logits = hidden @ weight.T / temperature
    logprobs, loss = [], torch.zeros((), dtype=torch.float64)
    for row, target, w, advantage in zip(
        logits, head.target.tolist(), objective.token_weight, objective.advantage, strict=True
    ):
        values = row.tolist()
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        order = [i for i in order if not truncation.vocabulary or i < truncation.vocabulary]
        order = order[: truncation.top_k or None]
        chances = torch.softmax(row[order].detach(), 0).tolist()
        count = next(
            n for n in range(1, len(order) + 1)
            if sum(chances[:n]) >= truncation.top_p - 1e-12 or n == len(order)
        )  # fmt: skip
        kept = order[:count]
        if not float(w):
            logprobs.append(0.0)
        elif target not in kept:
            logprobs.append(-math.inf)
        else:
            logprob = row[target] - torch.logsumexp(row[kept], 0)
            loss = loss - w * advantage * logprob
            logprobs.append(float(logprob))
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return float(loss), logprobs, hidden.grad, weight.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "truncation",
    [Truncation(top_p=0.8), Truncation(top_k=20), Truncation(30, 0.7, 100), Truncation()],
    ids=str,
)
def test_the_loss_is_that_of_the_truncated_policy(
    backend: str, truncation: Truncation, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_served(OP, backend, torch.float32)
    device = device_for(backend)
    head = make_head(37, 17, 131, device=device)
    # Most targets are probable, some are not kept.
    logits = head.hidden @ head.weight.T
    probable = logits.topk(4).indices[:, 3]
    third = torch.arange(37, device=device) % 3 == 0
    head = replace(head, target=torch.where(third, head.target, probable))
    objective = make_objective("grpo", 37, device, trained=0.8)
    assert isinstance(objective, Grpo)
    loss, logprobs, hidden_grad, weight_grad = by_hand(head, objective, truncation, 1.3)
    chunked(monkeypatch, 8)(head.weight)
    found = evaluate(head, objective, backend, temperature=1.3, truncation=truncation)
    assert float(found.loss) == pytest.approx(loss, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(found.logprob.tolist(), logprobs, rtol=1e-4, atol=1e-5)
    for ours, exact in ((found.hidden_grad, hidden_grad), (found.weight_grad, weight_grad)):
        assert (ours - exact).norm() <= 1e-5 * exact.norm()
    assert found.entropy.isfinite().all()
    outside = sum(math.isinf(value) for value in logprobs)
    assert bool(outside) == (truncation != Truncation())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nll", "mopd"])
def test_truncated_against_float64(backend: str, dtype: torch.dtype, kind: str) -> None:
    skip_unless_served(OP, backend, dtype)
    device = device_for(backend)
    head = make_head(29, 17, 131, dtype=dtype, device=device)
    objective = make_objective(kind, 29, device, trained=0.7)
    # Ids alone decide what is kept, whatever rounding does to the logits.
    cut = Truncation(vocabulary=60)
    exact = evaluate(head, objective, "reference", torch.float64, truncation=cut)
    torchs = evaluate(head, objective, "reference", truncation=cut)
    ours = evaluate(head, objective, backend, truncation=cut)
    assert torch.equal(ours.logprob == -torch.inf, exact.logprob == -torch.inf)
    inside = ours.logprob != -torch.inf
    assert bool(inside.any())
    assert not bool(inside.all())

    def finite(found: Any) -> Any:
        return found._replace(logprob=found.logprob[inside])

    assert_found(finite(ours), finite(torchs), finite(exact), factor_for(backend, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_that_are_not_kept_are_counted(backend: str) -> None:
    skip_unless_served(OP, backend, torch.float32)
    device = device_for(backend)
    head = make_head(20, 17, 131, device=device)
    objective = make_objective("nll", 20, device)
    out = linear_policy_loss(
        head.hidden, head.weight, head.target, objective, truncation=CUT, backend=backend
    )
    outside = out.logprob == -torch.inf
    assert 0 < int(outside.sum()) < 20
    assert float(out.metrics["outside"]) == pytest.approx(float(outside.float().mean()))
    assert float(out.metrics["tokens"]) == 20
    mean = out.logprob[~outside].sum() / 20
    assert float(out.metrics["logprob"]) == pytest.approx(float(mean), rel=1e-5)
    whole = linear_policy_loss(head.hidden, head.weight, head.target, objective, backend=backend)
    assert "outside" not in whole.metrics


def test_a_target_outside_of_the_vocabulary_is_still_an_error() -> None:
    head = make_head(9, 17, 131)
    head.target[4] = 131
    with pytest.raises(IndexError, match="outside the vocabulary"):
        linear_policy_loss(
            head.hidden, head.weight, head.target, Nll(torch.ones(9)), truncation=CUT
        )


@pytest.mark.parametrize("bad", [Truncation(-1), Truncation(top_p=0.0), Truncation(top_p=1.5)])
def test_truncations_without_meaning_are_rejected(bad: Truncation) -> None:
    head = make_head(3, 17, 131)
    with pytest.raises(ValueError, match="top_p"):
        linear_policy_loss(
            head.hidden, head.weight, head.target, Nll(torch.ones(3)), truncation=bad
        )
