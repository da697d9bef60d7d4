"""Settings of the commands `plan` and `preflight`. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from nemocascade.plan.workload import RolloutAssumptions
from nemocascade.recipe.rules import Count, Natural, Range, Seed
from nemocascade.runtime.launcher import world_size_of_environment


@dataclass(frozen=True)
class PlanSettings(RolloutAssumptions):
    """Predict the worst rank's memory and the step time of a recipe, over all legal layouts; for RL
    and MOPD the whole step by phase, with the layouts of training and of generation."""

    recipe: tyro.conf.Positional[str]
    """Recipe script."""

    gpus: Count = 8
    """Number of ranks."""

    gpu: str = "h200"
    """A known accelerator, or a JSON file with the fields of nemocascade.plan.gpus.Gpu."""

    model: str = ""
    """Model preset, for a recipe whose start artifact does not exist yet."""

    best: Count = 10
    """Number of layouts to print."""

    document: Natural = 0
    """Length of the documents that fill a pack; 0 = one document of the whole capacity."""

    longest: Natural = 0
    """Tokens of the longest document: packs may be halved down to it; 0 = fixed capacity."""

    imbalance: Annotated[float, Range(1)] = 1.5
    """Rows of the busiest rank's experts, relative to the mean."""

    teachers: Natural = 0
    """Number of teacher models kept on the device."""

    rollout_sequences: Natural = 0
    """Concurrent rollout sequences on the training ranks, over the world; 0 = the recipe's own."""

    rollout_length: Natural = 0
    """Length of the rollout sequences in tokens; 0 = the recipe's own."""

    margin: Annotated[float, Range(0, 1, open_high=True)] = 0.08
    """Share of the device's memory to leave free."""

    mamba2: Literal["auto", "triton", "fla", "torch"] = "auto"
    """Implementation of Mamba-2 on GPUs; auto: the one that the recipe is expected to use."""

    simulate: bool = False
    """Simulate one step of an RL or MOPD recipe on its own layouts, with random lengths and
    rewards."""

    seed: Seed = 1
    """Seed of the simulation."""

    measured: Annotated[str, tyro.conf.arg(name="from")] = ""
    """Simulate with the lengths and times that a run has measured: its metrics.jsonl."""

    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class PreflightSettings:
    """Check a recipe: settings, files, disk, tokenizer, start, memory, and a dry run of every rank.

    Devices and collectives are checked by the job itself when it starts.
    """

    recipe: tyro.conf.Positional[str]
    """Recipe script."""

    ranks: Natural = 0
    """World size; 0 = the launcher's, or 1 without one."""

    gpu: str = "h200"
    """A known accelerator, or a JSON file with the fields of nemocascade.plan.gpus.Gpu."""

    model: str = ""
    """Model preset, to check a recipe before its earlier stages have run; its start artifact is
    then not checked."""

    dry_run: bool = True
    """Build every rank's model on the meta device."""

    json: bool = False
    """Print one JSON object."""

    @property
    def world_size(self) -> int:
        """Number of ranks to check for."""
        return self.ranks or world_size_of_environment()
