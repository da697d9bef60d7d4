"""The recipe of a cascade: stages in order, scores, alarms and teachers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from nemocascade.recipe.mopd import MopdRecipe
from nemocascade.recipe.rl import GrpoRecipe
from nemocascade.recipe.scores import ScoreConfig, repeated
from nemocascade.recipe.sft import SftRecipe

StageRecipe = SftRecipe | GrpoRecipe | MopdRecipe
StageKind = Literal["sft", "grpo", "mopd"]


@dataclass(frozen=True)
class StageConfig[R: StageRecipe]:
    """One stage of a cascade."""

    name: str
    """Its folder is RUN/stages/NAME."""

    recipe: R
    """Recipe of the stage. The cascade sets its `run_dir`, its `init_from`, and the teachers that
    it leaves open; layout, steps and all else are its own."""

    start: str = ""
    """Stage before it whose artifact it starts from; empty = the main line's last one before it.
    The first stage starts as its recipe says."""

    side: bool = False
    """A side branch, such as a teacher's: the main line does not go through it."""

    @property
    def kind(self) -> StageKind:
        """Kind of the stage, by the type of its recipe."""
        if isinstance(self.recipe, SftRecipe):
            return "sft"
        return "mopd" if isinstance(self.recipe, MopdRecipe) else "grpo"


@dataclass(frozen=True)
class AlarmConfig:
    """When a stage has harmed a domain."""

    drop: float = 5.0
    """Points (hundredths of the mean reward) by which a domain's held-out score may lie below that
    of the artifact which the stage started from."""

    stop: bool = False
    """End the run at an alarm, instead of going on with a warning."""

    def problems(self) -> list[str]:
        """Every rule it breaks."""
        return [] if self.drop > 0 else [f"alarm.drop({self.drop}) must be above 0 points"]


@dataclass(frozen=True)
class TeacherChoice:
    """Who teaches a domain in MOPD, where the stage's recipe does not name an artifact."""

    pinned: dict[str, str] = field(default_factory=dict)
    """Stage by domain. Any other domain is taught by the artifact so far with its best held-out
    score; of equally good ones by the stage's own start, else the latest."""


@dataclass(frozen=True)
class CascadeRecipe:
    """Post-training stages, one after the other (Nemotron-Cascade 2, arXiv 2603.19220)."""

    run_dir: str = "runs/cascade"
    """Folder for everything the run writes."""

    stages: tuple[StageConfig[StageRecipe], ...] = ()
    """In the order in which they run."""

    scores: ScoreConfig = field(default_factory=ScoreConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    teachers: TeacherChoice = field(default_factory=TeacherChoice)

    keep_checkpoints: bool = False
    """Keep the checkpoints of stages that are done. Their artifacts stay either way."""

    def name_problems(self) -> list[str]:
        """Reasons why the stages' names cannot name their folders."""
        if not self.stages:
            return ["stages is empty: name at least one"]
        names = [s.name for s in self.stages]
        found = [f"stages: {n!r} stands twice: rename one" for n in repeated(names)]
        found += [
            f"stages: the name {n!r} must be letters, digits and _, as a folder's"
            for n in names
            if not re.fullmatch(r"[A-Za-z]\w*", n, flags=re.ASCII)
        ]
        return found
