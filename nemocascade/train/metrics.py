"""Metrics of a step and their outputs: metrics.jsonl, TensorBoard, log.txt and a live line on rank
0."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from nemocascade.runtime.files import naming, write_text
from nemocascade.runtime.jsonl import read_undamaged
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.world import World
from nemocascade.train.flops import peak_tflops
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
    return values | result.metrics


class MetricsWriter:
    """Writes one record per step on the main rank; does nothing on other ranks.

    When a run resumes, lines of metrics.jsonl after the first `first_step` steps are dropped, so
    that each step appears once.
    """

    def __init__(
        self, run_dir: Path, *, is_main: bool, first_step: int, steps: int, tensorboard: bool
    ) -> None:
        self.steps = steps
        self.path = run_dir / "metrics.jsonl"
        self.file: TextIO | None = None
        self.board: Any = None
        self.started = time.monotonic()
        self.first_step = first_step
        self.live = is_main and sys.stderr.isatty()
        if not is_main:
            return
        _keep_steps_until(self.path, first_step)
        self.file = self.path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record `values` of `step`, counted from 0; files and messages count from 1."""
        if self.file is None:
            return
        with naming(self.path):
            self.file.write(json.dumps({"step": step + 1, **values}) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, step + 1)
        self._show(step, values)

    def _show(self, step: int, values: dict[str, Any]) -> None:
        done = step + 1 - self.first_step
        left = (time.monotonic() - self.started) / max(1, done) * (self.steps - step - 1)
        parts = [f"step {step + 1}/{self.steps}"]
        for name, text in (
            ("loss", "loss {:.4f}"),
            ("heldout_loss", "held-out {:.4f}"),
            ("grad_norm", "grad norm {:.3f}"),
            ("lr", "lr {:.2e}"),
            ("tokens_per_s", "{:,.0f} tokens/s"),
            ("mfu", "MFU {:.1%}"),
        ):
            if isinstance(values.get(name), int | float):
                parts.append(text.format(values[name]))
        line = "  ".join(parts) + f"  {left / 60:.1f} min left"
        if self.live:
            sys.stderr.write("\r\x1b[2K" + line + ("\n" if step + 1 == self.steps else ""))
            sys.stderr.flush()
        elif done <= 3 or (step + 1) % max(1, self.steps // 20) == 0 or "heldout_loss" in values:
            LOGGER.info(line)

    def close(self) -> None:
        """Flush and close the files."""
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


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
