"""Batch invariance on the CPU: a token's result is bit-identical for any routing of the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers.pairs import pairwise
from nemocascade_kernels import (
    Routing,
    grouped_gemm,
    make_routing,
    moe_experts,
    moe_permute,
    moe_unpermute,
)
from nemocascade_kernels.common.activations import activate
from nemocascade_kernels.moe_experts import batch_invariant
from nemocascade_kernels.moe_experts.batch_invariant import (
    SLACK,
    cover,
    mm_rows,
    mm_rows_apart,
    sizes_for,
)
from nemocascade_kernels.testing import PoisonedMemory, assert_same_bits, random_normal
from torch import Tensor

OURS = 24  # tokens that stay as they are


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def neighbourhoods(experts: int, top_k: int, seed: int) -> Iterator[Tensor]:
    """Choices [T, K] of other tokens: from none at all to so many that library kernels change."""
    generator = torch.Generator().manual_seed(seed)
    for others in (0, 1, 2, 3, 5, 8, 40, 170, 700):
        skew = torch.rand(experts, generator=generator) * 4
        scores = torch.rand(others, experts, generator=generator) + skew
        yield scores.argsort(dim=-1, descending=True)[:, :top_k]


def run(
    function: str,
    own: tuple[Tensor, ...],
    others: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
    seed: int,
) -> tuple[Tensor, ...]:
    """Our tokens last, after the others: output, gradient of x, gradient of the routing weights."""
    own_x, own_experts, own_weights, own_grad = own
    count, hidden = others.shape[0], own_x.shape[1]
    x = torch.cat([random_normal(count, hidden, seed=seed, dtype=own_x.dtype), own_x])
    weights = torch.cat([random_normal(count, own_weights.shape[1], seed=seed + 1), own_weights])
    grad = torch.cat([random_normal(count, hidden, seed=seed + 2, dtype=own_x.dtype), own_grad])
    x.requires_grad_()
    weights.requires_grad_()
    routing = make_routing(torch.cat([others, own_experts]), weights, w_up.shape[0])
    with PoisonedMemory():
        y = layer(function, x, routing, w_up, w_down, activation)
        y.backward(grad)
    return y[count:].detach(), x.grad[count:], weights.grad[count:]


def layer(
    function: str, x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor, activation: str
) -> Tensor:
    if function.startswith("moe_experts"):
        backend = "torch" if function == "moe_experts in torch" else None
        return moe_experts(x, routing, w_up, w_down, activation=activation, backend=backend)
    h = grouped_gemm(moe_permute(x, routing), w_up, routing.offsets)
    # relu2 alone: torch's own silu is not position-independent.
    return moe_unpermute(grouped_gemm(activate(h, activation), w_down, routing.offsets), routing)


FUNCTIONS = [
    ("moe_experts", "relu2"),
    ("moe_experts", "swiglu"),
    ("moe_experts in torch", "swiglu"),
    ("grouped_gemm", "relu2"),
]
SIZES = [
    (8, 2, 128, 128, 1),
    (8, 2, 128, 256, 2),
    (4, 2, 512, 256, 1),
    (3, 1, 33, 19, 2),
    (4, 2, 264, 72, 1),
]
"""Experts, choices of a token, sizes of the hidden states and of an expert, threads."""


@pytest.mark.parametrize(
    ("sizes", "called", "dtype"),
    pairwise(SIZES, FUNCTIONS, (torch.float32, torch.bfloat16)),
    ids=str,
)
def test_a_token_does_not_see_its_neighbours(
    sizes: tuple[int, int, int, int, int], called: tuple[str, str], dtype: torch.dtype
) -> None:
    """Each two of sizes, function and dtype meet."""
    experts, top_k, hidden, width, cores = sizes
    function, activation = called
    gates = 2 if activation == "swiglu" else 1
    w_up = random_normal(experts, gates * width, hidden, seed=1, scale=hidden**-0.5, dtype=dtype)
    w_down = random_normal(experts, hidden, width, seed=2, scale=width**-0.5, dtype=dtype)
    choices = torch.rand(OURS, experts, generator=torch.Generator().manual_seed(3)).argsort(-1)
    own = (
        random_normal(OURS, hidden, seed=4, dtype=dtype),
        choices[:, :top_k],
        random_normal(OURS, top_k, seed=5),
        random_normal(OURS, hidden, seed=6, dtype=dtype),
    )
    alone = None
    for seed, others in enumerate(neighbourhoods(experts, top_k, seed=7)):
        with threads(cores):
            found = run(function, own, others, w_up, w_down, activation, 10 * seed)
        alone = found if alone is None else alone
        for name, ours, expected in zip(("y", "dx", "dweights"), found, alone, strict=True):
            assert_same_bits(f"{name} beside {others.shape[0]} tokens", ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_on_inputs_that_show_every_rounding(dtype: torch.dtype, transposed: bool) -> None:
    x, weight = batch_invariant._cancelling(1200, 512, 256, dtype)
    weight = weight if transposed else weight.contiguous()
    counts = (1, 2, 3, 4, 5, 6, 7, 8, 31, 33, 100, 257, 700, 1025)
    row = torch.empty(1 + SLACK, 256, dtype=dtype)
    mm_rows(x[567:].clone(), weight, row, 1)
    for count in counts:
        for place in {0, count // 2, count - 1}:
            moved = torch.roll(x, place - 567, dims=0)
            buffer = torch.empty(count + SLACK, 256, dtype=dtype)
            mm_rows(
                torch.cat([moved[:count], torch.empty(SLACK, 512, dtype=dtype)]),
                weight,
                buffer,
                count,
            )
            assert_same_bits(f"row {place} of {count}", buffer[place], row[0])
            exact = torch.empty(count + 3, 256, dtype=dtype)
            mm_rows_apart(moved[: count + 3], weight, exact, 3, count)
            if place >= 3:
                assert_same_bits(f"row {place} of {count}, apart", exact[place], row[0])


def test_the_probe_sees_a_library_that_is_not_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    """If one size gave other bits, it would not be used; if none agreed with itself, we reject."""
    plain = torch.mm

    def odd_at_256(a: Tensor, b: Tensor, **options: Tensor) -> Tensor:
        result = plain(a, b, **options)
        return result + 1e-6 * result.abs() + 1e-12 if a.shape[0] == 256 else result

    monkeypatch.setattr(batch_invariant.torch, "mm", odd_at_256)
    sizes = batch_invariant._sizes.__wrapped__(torch.float32, 64, 48, True, 1)
    assert 256 not in sizes
    assert 32 in sizes

    def by_position(a: Tensor, b: Tensor, **options: Tensor) -> Tensor:
        return plain(a, b, **options) + torch.arange(a.shape[0])[:, None] * 1e-3

    monkeypatch.setattr(batch_invariant.torch, "mm", by_position)
    with pytest.raises(RuntimeError, match="no number of rows"):
        batch_invariant._sizes.__wrapped__(torch.float32, 64, 48, True, 1)


def test_cover_is_sufficient_and_close() -> None:
    sizes = sizes_for(torch.zeros(64, 48))
    for count in range(1, 3000, 7):
        pieces = cover(count, sizes)
        assert set(pieces) <= set(sizes)
        assert count <= sum(pieces) <= count + 160
        assert sum(pieces) - count < SLACK


def test_order_of_the_sum_is_the_order_of_the_choices() -> None:
    """Rows of wildly different size: any other order of addition would round differently."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.rand(50, 8, generator=generator).argsort(-1)[:, :6]
    weights = torch.ones(50, 6)
    routing = make_routing(experts, weights, 8)
    slots = random_normal(50, 6, 33, seed=1) * 10.0 ** torch.randint(
        -3, 6, (50, 6, 1), generator=generator
    )
    rows = slots.reshape(300, 33)[routing.order.long()]
    expected = slots[:, 0].clone()
    for k in range(1, 6):
        expected += slots[:, k]
    assert_same_bits("sum", moe_unpermute(rows, routing), expected)
    masked = replace(routing, weights=weights * 2)
    assert_same_bits("weighted sum", moe_unpermute(rows, masked), expected * 2)
