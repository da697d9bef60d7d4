"""The numbers of one step, by the names that every stage shares."""

from __future__ import annotations

from typing import Any

from nemocascade.runtime.world import World
from nemocascade.train.flops import peak_tflops
from nemocascade.train.metrics import load_imbalance, peak_memory_gib
from nemocascade.train.trainer import StepResult


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps happens after step `step` (from 0)."""
    return every > 0 and (step + 1) % every == 0


def step_values(result: StepResult, lr: float, step_time_s: float, world: World) -> dict[str, Any]:
    """A line of metrics.jsonl. `mfu` is None where the device's peak is not known."""
    peak = peak_tflops(world.device)
    achieved = result.flops / step_time_s / world.size / 1e12
    values: dict[str, Any] = {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens": result.tokens,
        "trained_tokens": result.trained_tokens,
        "tokens_per_s": result.tokens / step_time_s,
        "step_time_s": step_time_s,
        "tflops_per_rank": achieved,
        "mfu": None if peak is None else achieved / peak,
        "peak_memory_gib": peak_memory_gib(world.device),
    }
    if result.expert_load is not None:
        values |= load_imbalance(result.expert_load)
    if result.expert_bias is not None:
        values["moe_bias_range"] = float(
            (result.expert_bias.amax(1) - result.expert_bias.amin(1)).mean()
        )
    return values | result.metrics
