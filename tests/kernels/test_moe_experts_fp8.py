"""moe_experts in FP8: the definition's arithmetic, and the Triton kernels against it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from nemocascade_kernels import Routing, moe_experts, moe_route
from nemocascade_kernels.backends import BackendUnavailableError
from nemocascade_kernels.moe_experts.fp8 import E4M3, quantize, rounded
from nemocascade_kernels.moe_experts.op import FP8
from nemocascade_kernels.testing import (
    PoisonedMemory,
    assert_same_bits,
    kernel_device,
    max_error,
    random_normal,
    rms_error,
)
from torch import Tensor

NAMES = ("output", "x", "routing weights", "w_up", "w_down")


@pytest.fixture(params=["triton", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = FP8.limitation(torch.zeros(1, 1, device=device_of(name)), backend=name)
    if reason is not None:
        pytest.skip(reason)
    return name


def device_of(backend: str) -> torch.device:
    return kernel_device() if backend == "triton" else torch.device("cpu")


def routing_of(kind: str, tokens: int, experts: int, top_k: int) -> Routing:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(tokens, experts, generator=generator)
    if kind == "empty_experts":
        logits[:, ::2] = -50.0
    elif kind == "one_expert":
        logits[:, -1] = 50.0
    mask = torch.rand(tokens, generator=generator) > 0.4 if kind == "masked" else None
    if kind == "all_masked":
        mask = torch.zeros(tokens, dtype=torch.bool)
    return moe_route(logits, top_k, scale=2.5, token_mask=mask, backend="reference")


class Problem:
    """Inputs of one call, and what it gives: output and all four gradients."""

    def __init__(self, routing: Routing, hidden: int, width: int, activation: str) -> None:
        experts, gates = routing.num_experts, 2 if activation == "swiglu" else 1
        self.routing, self.activation = routing, activation
        self.x = random_normal(routing.tokens, hidden, seed=2)
        self.w_up = random_normal(experts, gates * width, hidden, seed=3, scale=hidden**-0.5)
        self.w_down = random_normal(experts, hidden, width, seed=4, scale=width**-0.5)
        self.grad = random_normal(routing.tokens, hidden, seed=5)

    def solve(
        self, backend: str, dtype: torch.dtype = torch.float32, **settings: Any
    ) -> tuple[Any, ...]:
        """Inputs are rounded to bfloat16 first, so that every dtype is given the same numbers."""
        device = device_of(backend)
        leaves = [
            tensor.bfloat16().to(device, dtype, copy=True).requires_grad_()
            for tensor in (self.x, self.w_up, self.w_down)
        ]
        weights = self.routing.weights.detach().to(device, copy=True).requires_grad_()
        moved = {name: value.to(device) for name, value in vars(self.routing).items()}
        routing = Routing(**{**moved, "weights": weights})
        settings = {"fp8": True, "backend": backend} | settings
        with PoisonedMemory():
            output = moe_experts(leaves[0], routing, *leaves[1:], activation=self.activation,
                                 **settings)  # fmt: skip
            output.backward(self.grad.bfloat16().to(device, dtype))
        gradients = (leaves[0].grad, weights.grad, leaves[1].grad, leaves[2].grad)
        return tuple(t.cpu() for t in (output.detach(), *gradients) if t is not None)


def assert_within(limit: float, ours: tuple[Any, ...], exact: tuple[Any, ...]) -> None:
    for name, mine, true in zip(NAMES, ours, exact, strict=True):
        for measure in (rms_error, max_error):
            error = measure(mine, true)
            assert error <= limit, f"{name}: {measure.__name__} {error:.2e} exceeds {limit:.0e}"


KINDS = ("random", "empty_experts", "one_expert", "masked", "all_masked")


@pytest.mark.parametrize(
    ("kind", "activation", "sizes"),
    [
        *((kind, "relu2", (67, 6, 2, 40, 24)) for kind in KINDS),
        *((kind, "swiglu", (67, 6, 2, 40, 24)) for kind in ("random", "masked")),
        # Tiles of 128 rows that are full and partial, several blocks of each width.
        ("random", "relu2", (150, 3, 2, 300, 140)),
        ("random", "swiglu", (150, 2, 2, 200, 140)),
        ("random", "relu2", (1, 1, 1, 1, 1)),
        ("random", "swiglu", (0, 4, 2, 8, 8)),
        ("random", "swiglu", (3, 9, 4, 17, 31)),
    ],
    ids=str,
)
def test_kernels_equal_the_definition(kind: str, activation: str, sizes: Any) -> None:
    tokens, experts, top_k, hidden, width = sizes
    problem = Problem(routing_of(kind, tokens, experts, top_k), hidden, width, activation)
    assert_within(1e-6, problem.solve("triton"), problem.solve("reference"))


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_blocks_have_the_shapes_of_the_definition(activation: str) -> None:
    """Values over 18 binades: those far below the largest of their block are rounded to few bits,
    so that another shape of the blocks gives another result."""
    problem = Problem(routing_of("random", 140, 2, 1), 200, 140, activation)
    generator = torch.Generator().manual_seed(9)
    for values in (problem.x, problem.w_up, problem.w_down, problem.grad):
        values *= 2.0 ** torch.randint(-14, 5, values.shape, generator=generator)
    assert_within(1e-6, problem.solve("triton"), problem.solve("reference"))


def test_kernels_equal_the_definition_in_bfloat16() -> None:
    """Pre-activations are rounded alike, so that both quantise the same activations."""
    for activation in ("relu2", "swiglu"):
        problem = Problem(routing_of("random", 150, 3, 2), 200, 140, activation)
        ours, exact = (problem.solve(name, torch.bfloat16) for name in ("triton", "reference"))
        assert_within(1e-6, (*exact[:2], *ours[2:]), exact)
        # The output and the gradient of x are sums of rows in bfloat16.
        assert_within(8e-3, ours, exact)


def test_values_that_e4m3_holds_lose_nothing(backend: str) -> None:
    """Operands of few significant bits: the result and all gradients are those without FP8."""
    routing = routing_of("random", 90, 3, 2)
    routing = replace(routing, weights=torch.full_like(routing.weights, 0.5))
    problem = Problem(routing, 200, 140, "relu2")
    generator = torch.Generator().manual_seed(6)

    def of(values: list[float], like: Tensor) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), like.shape, generator=generator)]

    def one_in_a_row(like: Tensor) -> Tensor:
        rows = torch.zeros_like(like)
        at = torch.randint(like.shape[1], (like.shape[0], 1), generator=generator)
        return rows.scatter_(1, at, of([1.0, -2.0, 3.0], at))

    problem.x, problem.grad = one_in_a_row(problem.x), one_in_a_row(problem.grad)
    problem.w_up = of([1.0, -1.0, 0.0, 2.0], problem.w_up)
    problem.w_down = of([1.0, -0.5, 0.0], problem.w_down)
    exact = problem.solve("reference", fp8=False)
    ours = problem.solve(backend)
    for name, mine, true in zip(NAMES, ours, exact, strict=True):
        assert true.abs().max() > 0
        torch.testing.assert_close(mine, true, rtol=0, atol=0, msg=name)


def test_error_against_exact_products(backend: str) -> None:
    """The rounding of two operands to 4 significant bits: 2 to 7 %."""
    for activation in ("relu2", "swiglu"):
        problem = Problem(routing_of("random", 150, 3, 2), 200, 140, activation)
        exact = problem.solve("reference", fp8=False)
        for name, mine, true in zip(NAMES, problem.solve(backend), exact, strict=True):
            assert 0.005 < rms_error(mine, true) < 0.07, name


def test_scales_are_powers_of_two() -> None:
    x = random_normal(5, 300, seed=7) * torch.tensor([1.0, 1e-30, 1e30, 0.0, 448.0])[:, None]
    x[4, 0] = 448.0 * 2**20
    values, scale = quantize(x, 1)
    assert values.dtype == E4M3
    assert values.shape == (5, 384)
    assert scale.shape == (5, 3)
    assert (torch.frexp(scale).mantissa == 0.5).all()
    largest = values.float().unflatten(1, (3, 128)).abs().amax(-1)
    assert ((largest > 223) & (largest <= 448))[[0, 1, 2, 4]].all()
    assert (values[3].float() == 0).all()
    assert scale[4, 0] == 2.0**20
    # Half the distance of neighbours; the smallest e4m3 values have a distance of 2^-9.
    error, spacing = (rounded(x, 1) - x).abs(), scale.repeat_interleave(128, 1)[:, :300] * 2**-9
    assert (error <= torch.maximum(x.abs() / 8, spacing) / 2).all()
    assert error[0].max() > 0


def test_blocks_of_weights_and_projections_are_apart(backend: str) -> None:
    """A huge value disturbs its own block: other experts and the other projection stay exact."""
    problem = Problem(routing_of("random", 60, 2, 1), 130, 60, "swiglu")
    clean = problem.solve(backend)
    problem.w_up[1, 70, 129] = 1e6
    dirty = problem.solve(backend)
    of_first = (problem.routing.experts == 0).squeeze(1)
    assert_same_bits("output", dirty[0][of_first], clean[0][of_first])
    assert_same_bits("w_up", dirty[3][0], clean[3][0])
    assert_same_bits("w_down", dirty[4][0], clean[4][0])


def test_rows_of_masked_tokens_may_hold_anything(backend: str) -> None:
    routing = routing_of("masked", 50, 4, 2)
    absent = (routing.experts == 4).all(dim=1)
    problem = Problem(routing, 16, 24, "relu2")
    clean = problem.solve(backend)
    problem.x[absent] = problem.grad[absent] = torch.nan
    for name, dirty, expected in zip(NAMES, problem.solve(backend), clean, strict=True):
        assert_same_bits(name, dirty, expected)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_values_that_are_not_finite_are_seen(backend: str, value: float) -> None:
    """e4m3 has no infinity: the scale of their block carries them."""
    problem = Problem(routing_of("random", 20, 2, 1), 16, 8, "relu2")
    problem.x[3, 5] = value
    output = problem.solve(backend)[0]
    assert output[3].isnan().all()
    assert output[:3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_gradients_are_added_to(backend: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    problem = Problem(routing_of("empty_experts", 60, 6, 2), 32, 16, "relu2")
    _, _, _, *expected = problem.solve(backend, dtype)
    weights = [
        w.bfloat16().to(device, dtype).requires_grad_() for w in (problem.w_up, problem.w_down)
    ]
    for weight in weights:
        weight.main_grad = torch.full(weight.shape, 3.0, device=device)
        weight.grad_added_to_main_grad = False
    moved = {name: value.to(device) for name, value in vars(problem.routing).items()}
    y = moe_experts(
        problem.x.bfloat16().to(device, dtype), Routing(**moved), *weights, fp8=True,
        accumulate_main_grad=True, backend=backend,
    )  # fmt: skip
    y.backward(problem.grad.bfloat16().to(device, dtype))
    tolerance = {"rtol": 1e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for weight, grad in zip(weights, expected, strict=True):
        assert weight.grad_added_to_main_grad
        torch.testing.assert_close(weight.main_grad.cpu() - 3.0, grad.float(), **tolerance)
        assert (weight.main_grad[0] == 3.0).all(), "an expert without tokens gets nothing"


def test_inference_gives_the_same_output(backend: str) -> None:
    device = device_of(backend)
    problem = Problem(routing_of("random", 60, 5, 2), 24, 16, "swiglu")
    expected = problem.solve(backend)[0]
    leaves = [t.bfloat16().float().to(device) for t in (problem.x, problem.w_up, problem.w_down)]
    moved = {name: value.to(device) for name, value in vars(problem.routing).items()}
    with PoisonedMemory():
        y = moe_experts(leaves[0], Routing(**moved), *leaves[1:], activation="swiglu", fp8=True,
                        backend=backend)  # fmt: skip
    assert_same_bits("output", y.cpu(), expected)


def test_tokens_of_the_kernels_are_independent_of_others() -> None:
    """Scales are those of a token's own row, so its bits do not depend on its expert's others."""
    problem = Problem(routing_of("random", 80, 3, 2), 160, 40, "relu2")
    whole = problem.solve("triton")
    problem.x[40:] = random_normal(40, 160, seed=8) * 100
    problem.grad[40:] = 1e3
    part = problem.solve("triton")
    for index in range(3):
        assert_same_bits(NAMES[index], part[index][:40], whole[index][:40])


def test_unavailable_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(routing_of("random", 4, 3, 2), 8, 8, "relu2")
    with pytest.raises(ValueError, match="moe_experts_fp8 has no backend 'native'"):
        problem.solve("native")
    x = torch.empty(4, 8, device="meta")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(
        BackendUnavailableError, match=r"for Hopper \(9.0\), and the device has \(8, 0\)"
    ):
        FP8.chosen(x)
