"""The routers' auxiliary losses on packed documents, against their definition by document."""

from __future__ import annotations

import itertools

import pytest
import torch
from nemocascade_kernels import Routing, moe_route
from torch import Tensor

from nemocascade.megatron.layers.mlp import activate
from nemocascade.megatron.layers.moe_loss import attach_loss, load_balance_loss, z_loss
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.types import Document, pack_documents

LENGTHS, CAPACITY, EXPERTS, TOP_K = (5, 1, 17, 9), 40, 6, 2
TOKENS = sum(LENGTHS)


def microbatch() -> Microbatch:
    documents = [
        Document(torch.zeros(n, dtype=torch.int32), torch.ones(n, dtype=torch.bool), "x")
        for n in LENGTHS
    ]
    return Microbatch.from_batch(pack_documents(documents, CAPACITY), torch.device("cpu"))


def route(packed: Microbatch, score: str) -> tuple[Tensor, Routing]:
    """Logits that favour low ids; those of padding hold NaN."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(CAPACITY, EXPERTS, generator=generator)
    logits -= torch.linspace(0, 2, EXPERTS)
    logits[TOKENS:] = torch.nan
    mask = packed.token_mask(slice(0, CAPACITY))
    routing = moe_route(logits, TOP_K, score=score, token_mask=mask)
    return logits.requires_grad_(), routing


def imbalance(logits: Tensor, experts: Tensor, score: str) -> Tensor:
    """`sum_e f_e P_e` of one document."""
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    shares = (scores / scores.sum(-1, keepdim=True)).mean(0)
    frequency = torch.bincount(experts.reshape(-1).long(), minlength=EXPERTS) / experts.numel()
    return EXPERTS * (frequency * shares).sum()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("over", ["sequence", "global"])
def test_load_balance_loss(over: str, score: str) -> None:
    packed = microbatch()
    logits, routing = route(packed, score)
    rows = slice(0, CAPACITY)
    loss = load_balance_loss(logits, routing, packed, rows, score=score, over=over, group=None)
    if over == "sequence":
        bounds = itertools.pairwise(itertools.accumulate(LENGTHS, initial=0))
        cuts, factor = [slice(a, b) for a, b in bounds], 1
    else:
        cuts, factor = [slice(0, TOKENS)], len(LENGTHS)
    parts = [imbalance(logits[cut], routing.experts[cut], score) for cut in cuts]
    expected = factor * torch.stack(parts).sum()
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(grad[:TOKENS], expected_grad[:TOKENS])
    assert (grad[TOKENS:] == 0).all()
    assert expected > len(LENGTHS), "the loads are even: the test would see no wrong weight"


def test_z_loss() -> None:
    packed = microbatch()
    logits, _ = route(packed, "sigmoid")
    loss = z_loss(logits, packed, slice(0, CAPACITY))
    expected = len(LENGTHS) * logits[:TOKENS].logsumexp(-1).square().mean()
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad[TOKENS:] == 0).all()
    assert grad[:TOKENS].abs().min() > 0


def test_an_attached_loss_adds_its_gradient_and_changes_no_value() -> None:
    x = torch.randn(3, requires_grad=True)
    w = torch.tensor(2.0, requires_grad=True)
    y = attach_loss(x * 3, w.square(), 0.25)
    assert torch.equal(y, x * 3)
    y.sum().backward()
    assert w.grad is not None
    assert float(w.grad) == 0.25 * 2 * 2.0
    assert torch.equal(x.grad, torch.full((3,), 3.0))


def test_squared_relu_and_its_gradient() -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-3, 3.0, torch.nan], requires_grad=True)
    y = activate(x, "relu2")
    torch.testing.assert_close(y, torch.relu(x).square(), equal_nan=True)
    y[:-1].sum().backward()
    torch.testing.assert_close(x.grad[:-1], 2 * torch.relu(x.detach())[:-1])
