"""AdamW whose moments are stored in bfloat16, for where Transformer Engine's is not used.

A step reads both moments in float32, updates them and the parameters by torch's AdamW, and rounds
the moments to the nearest bfloat16, which is what Transformer Engine's fused Adam does. Rounding is
not stochastic: a moment then depends on its gradients alone, so that every layout and every resumed
run has the same bits. The price is that a moment m stays where it is while a step would change it
by less than half its last bit, |x - m| < 2^-8 |m| / (1 - beta); `OptimizerConfig` limits beta.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq")
BATCH_ELEMENTS = 1 << 26
"""Elements whose moments are in float32 at a time: 512 MiB of them."""


class Bf16MomentsAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` for float32 parameters, with `exp_avg` and `exp_avg_sq` in bfloat16."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for batch in _batches(trained):
                self._update(group, batch)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self._state_of(p, fused=bool(group["fused"])) for p in parameters]
        first, second = ([s[name].float() for s in states] for name in MOMENTS)
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            first,
            second,
            [],
            [s["step"] for s in states],
            foreach=group["foreach"],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for state, *moments in zip(states, first, second, strict=True):
            for name, moment in zip(MOMENTS, moments, strict=True):
                state[name].copy_(moment)

    def _state_of(self, parameter: Tensor, *, fused: bool) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            device = parameter.device if fused else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        return state


def _batches(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Consecutive parameters, together of at most `BATCH_ELEMENTS` or one."""
    found: list[list[Tensor]] = []
    size = 0
    for parameter in parameters:
        if not found or size + parameter.numel() > BATCH_ELEMENTS:
            found.append([])
            size = 0
        found[-1].append(parameter)
        size += parameter.numel()
    return found
