"""Metrics of a step and their outputs on rank 0: metrics.jsonl, trackers and the progress line."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path
from typing import Any, TextIO

import torch

from nemocascade.recipe import PolicyRecipe, SftRecipe
from nemocascade.recipe.changes import as_json
from nemocascade.runtime.files import naming, write_text
from nemocascade.runtime.jsonl import read_undamaged
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.world import World
from nemocascade.train.flops import peak_tflops
from nemocascade.train.lead_time import LeadTime
from nemocascade.train.progress import Progress
from nemocascade.train.trackers import Trackers
from nemocascade.train.trainer import StepResult


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def load_imbalance(load: torch.Tensor) -> dict[str, Any]:
    """Metrics of the load balance over experts. load: [layers, E], slots of each expert.

    `moe_max_load_by_layer`: the busiest expert's load divided by the mean load (1 = even), by MoE
    layer. `moe_max_load`: their mean. `moe_load_entropy`: entropy of the load divided by log E
    (1 = even, 0 = a single expert), mean over layers. `moe_idle_experts`: fraction of experts
    without load.
    """
    busiest = load.amax(1) / load.mean(1).clamp(min=1e-9)
    shares = load / load.sum(1, keepdim=True).clamp(min=1e-9)
    entropy = torch.special.entr(shares).sum(1) / math.log(max(2, load.shape[1]))
    return {
        "moe_max_load": float(busiest.mean()),
        "moe_max_load_by_layer": [round(float(value), 4) for value in busiest],
        "moe_load_entropy": float(entropy.mean()),
        "moe_idle_experts": float((load == 0).float().mean()),
    }


def is_due(step: int, every: int) -> bool:
    """True if something that happens every `every` steps is due after step `step` (from 0)."""
    return every > 0 and (step + 1) % every == 0


def step_values(result: StepResult, lr: float, step_time_s: float, world: World) -> dict[str, Any]:
    """One line of metrics.jsonl. `mfu` is None if the device's peak is unknown."""
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
    return values | result.stragglers | result.metrics


class MetricsWriter:
    """Writes one record per step on the main rank; does nothing on other ranks.

    When a run resumes, lines of metrics.jsonl after the first `first_step` steps are dropped, so
    that each step appears once. recipe: the resolved recipe of the stage, for its trackers.
    """

    def __init__(self, recipe: SftRecipe | PolicyRecipe, world: World, first_step: int) -> None:
        run_dir = Path(recipe.run_dir)
        self.path = run_dir / "metrics.jsonl"
        self.file: TextIO | None = None
        if not world.is_main:
            return
        _keep_steps_until(self.path, first_step)
        self.file = self.path.open("a", encoding="utf-8")
        self.trackers = Trackers(recipe.log.chosen, run_dir, as_json(recipe), first_step)
        self.lead_time = LeadTime()
        self.progress = Progress(world.console, steps=recipe.steps, first_step=first_step)
        world.watch.on_change = self.progress.show_activity

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record `values` of `step`, counted from 0; files and messages count from 1."""
        if self.file is None:
            return
        with naming(self.path):
            self.file.write(json.dumps({"step": step + 1, **values}) + "\n")
            self.file.flush()
        self.trackers.log(step + 1, values)
        self.progress.show(step, values)
        self.lead_time.observe(values)

    def close(self) -> None:
        """Flush and close the files."""
        if self.file is not None:
            self.file.close()
            self.trackers.close()


def _keep_steps_until(path: Path, last: int) -> None:
    if not path.exists():
        return

    def warn(line: str) -> None:
        LOGGER.warning("%s: a line that a crash cut short is dropped: %.60s", path, line)

    kept = []
    for line, row in read_undamaged(path, warn):
        if "step" not in row:
            warn(line)
        elif row["step"] <= last:
            kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))
