"""Problems on a linear head, and three results to compare: exact, torch's, ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from nemocascade_kernels import Grpo, Mopd, Nll, Objective, backends, linear_policy_loss
from nemocascade_kernels.testing import (
    PoisonedMemory,
    assert_as_accurate,
    kernel_device,
    random_integers,
    random_normal,
)
from torch import Tensor

BACKENDS = ("torch", "native", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Triton's interpreter cuts off where hardware rounds, so bfloat16 loses up to twice as much there.
INTERPRETER_FACTOR = 2.0


def device_for(backend: str) -> torch.device:
    """Where a backend is tested."""
    return kernel_device() if backend in ("triton", "cuda") else torch.device("cpu")


def skip_unless_served(op: backends.Op, backend: str, dtype: torch.dtype) -> None:
    """Skip, with the backend's own reason, where it cannot serve the dtype."""
    probe = torch.zeros(1, 1, dtype=dtype, device=device_for(backend))
    try:
        op.chosen(probe, backend=backend)
    except backends.BackendUnavailableError as error:
        pytest.skip(str(error))


def factor_for(backend: str, dtype: torch.dtype) -> float:
    """How much further from exact than torch a backend may be."""
    interpreted = backend == "triton" and backends.interpreting() and dtype == torch.bfloat16
    return 2.0 * (INTERPRETER_FACTOR if interpreted else 1.0)


@dataclass(frozen=True)
class Head:
    """hidden [T, H], weight [V, H], target [T], in the dtype under test."""

    hidden: Tensor
    weight: Tensor
    target: Tensor

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Fresh leaves of hidden and weight, in another dtype if one is given."""
        dtype = dtype or self.hidden.dtype
        return tuple(  # type: ignore[return-value]
            tensor.detach().to(dtype, copy=True).requires_grad_()
            for tensor in (self.hidden, self.weight)
        )


def make_head(
    tokens: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Head:
    """Logits of standard deviation about 2, as a trained head has."""
    return Head(
        random_normal(tokens, width, seed=seed, dtype=dtype, device=device),
        random_normal(
            vocabulary, width, seed=seed + 1, dtype=dtype, device=device, scale=2 * width**-0.5
        ),
        random_integers(tokens, high=vocabulary, seed=seed + 2, device=device),
    )


OBJECTIVES = ("nll", "grpo", "grpo_kl", "grpo_kl_none", "grpo_kl_rollout", "mopd")


def make_objective(
    kind: str, tokens: int, device: torch.device | str = "cpu", trained: float = 1.0, seed: int = 7
) -> Objective:
    """An objective with random constants; a fraction `trained` of the rows has a weight."""

    def normal(number: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return random_normal(tokens, seed=seed + number, device=device, scale=scale) + mean

    weight = normal(0).abs() + 0.1
    drawn = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)).to(device)
    weight = torch.where(drawn < trained, weight, 0.0)
    if kind == "nll":
        return Nll(weight)
    if kind == "grpo":
        return Grpo(weight, normal(1))
    if kind == "grpo_kl":
        return Grpo(weight, normal(1), normal(2, 0.5, -5.0), 0.03)
    if kind == "grpo_kl_none":
        return Grpo(weight, normal(1), normal(2, 0.5, -5.0), 0.3, "none")
    if kind == "grpo_kl_rollout":
        # Both clamps hold for some tokens.
        rollout = normal(5, 0.5, -6.0)
        return Grpo(weight, normal(1), normal(2, 0.5, -5.0), 0.3, "rollout", rollout, 2.0, 1.5)
    # Ratios on both sides of the gate: log-probabilities here lie around -6.
    return Mopd(weight, normal(3, 1.0, -5.0), normal(4, 3.0, -6.0))


class Found(NamedTuple):
    """Results of one evaluation."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor


def evaluate(
    head: Head,
    objective: Objective,
    backend: str,
    dtype: torch.dtype | None = None,
    upstream: float = 1.0,
    **settings: object,
) -> Found:
    """Loss, rows and gradients of a policy loss."""
    hidden, weight = head.leaves(dtype)
    with PoisonedMemory():
        out = linear_policy_loss(
            hidden,
            weight,
            head.target,
            objective,
            backend=backend,
            return_entropy=True,
            **settings,  # type: ignore[arg-type]
        )
        (out.loss * upstream).backward()
    assert out.entropy is not None
    assert hidden.grad is not None
    assert weight.grad is not None
    return Found(out.loss.detach(), out.logprob, out.entropy, hidden.grad, weight.grad)


def assert_found(ours: Found, torchs: Found, exact: Found, factor: float) -> None:
    """Every part of ours is about as accurate as torch's own."""
    for name, a, b, c in zip(Found._fields, ours, torchs, exact, strict=True):
        # Sums of float32 in another order differ by a few units, even where torch's were lucky.
        floor = 16 * torch.finfo(torch.float32).eps if a.dtype == torch.float32 else None
        if name == "loss":
            # Terms of both signs cancel: judge by the rows' errors, not by the small sum.
            scale = max(float(c.abs()), float(exact.logprob.abs().sum()) * 0.05)
            assert abs(float(a) - float(c)) <= max(
                factor * abs(float(b) - float(c)), 1e-6 * scale
            ), f"loss {float(a)}, exact {float(c)}, torch's {float(b)}"
            continue
        assert_as_accurate(name, a, b, c, factor=factor, floor=floor)


def chunked(monkeypatch: pytest.MonkeyPatch, rows: int) -> Callable[[Tensor], None]:
    """Make chunks of about `rows` rows, so that small problems have several."""

    def apply(weight: Tensor) -> None:
        from nemocascade_kernels.common.linear_head import chunks

        size = rows * (weight.shape[0] + 64) * weight.element_size()
        monkeypatch.setattr(chunks, "LOGITS_BYTES", {"cpu": size, "cuda": size})

    return apply
