"""Recipe of a cascade: ordered stages, scores, alarms and teachers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from nemocascade.recipe.mopd import MopdRecipe
from nemocascade.recipe.paths import OutputPath
from nemocascade.recipe.rl import GrpoRecipe
from nemocascade.recipe.rules import Positive
from nemocascade.recipe.scores import ScoreConfig, repeated
from nemocascade.recipe.sft import SftRecipe

StageRecipe = SftRecipe | GrpoRecipe | MopdRecipe
STAGE_NAME = re.compile(r"[A-Za-z]\w{0,99}", flags=re.ASCII)
"""Legal names of stages, which are names of folders too."""
StageKind = Literal["sft", "grpo", "mopd"]


@dataclass(frozen=True)
class StageConfig[R: StageRecipe]:
    """One stage of a cascade."""

    name: str
    """Name of the stage; its folder is RUN/stages/NAME."""

    recipe: R
    """Recipe of the stage. The cascade sets its `run_dir`, its `init_from` and its open teachers;
    all other settings, such as layout and steps, are its own."""

    start: str = ""
    """Earlier stage whose artifact this one starts from; empty = the last one before it on the main
    line. The first stage starts as its recipe says."""

    side: bool = False
    """True for a side branch, such as a teacher's: the main line skips it."""

    @property
    def kind(self) -> StageKind:
        """Kind of the stage, from the type of its recipe."""
        if isinstance(self.recipe, SftRecipe):
            return "sft"
        return "mopd" if isinstance(self.recipe, MopdRecipe) else "grpo"


@dataclass(frozen=True)
class AlarmConfig:
    """Alarm for a stage that lowers a domain's score."""

    drop: Positive = 5.0
    """Points (hundredths of the mean reward) by which a domain's held-out score may be below that
    of the stage's start artifact."""

    stop: bool = False
    """Stop the run at an alarm instead of only warning."""


@dataclass(frozen=True)
class TeacherChoice:
    """Choice of a domain's teacher in MOPD, if the stage's recipe names no artifact."""

    pinned: dict[str, str] = field(default_factory=dict)
    """Teacher stage by domain. Any other domain gets the earlier artifact with the best held-out
    score; ties go to the stage's own start, otherwise to the latest."""


@dataclass(frozen=True)
class CascadeRecipe:
    """Post-training stages, one after the other (Nemotron-Cascade 2, arXiv 2603.19220)."""

    run_dir: OutputPath = "runs/cascade"
    """Run folder, for everything that the run writes."""

    stages: tuple[StageConfig[StageRecipe], ...] = ()
    """Stages in execution order."""

    scores: ScoreConfig = field(default_factory=ScoreConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    teachers: TeacherChoice = field(default_factory=TeacherChoice)

    keep_checkpoints: bool = False
    """Keep the checkpoints of finished stages. Their artifacts are always kept."""

    def name_problems(self) -> list[str]:
        """Reasons why the stage names are not valid folder names."""
        if not self.stages:
            return ["stages is empty: name at least one"]
        names = [s.name for s in self.stages]
        found = [f"stages: {n!r} occurs twice: rename one" for n in repeated(names)]
        found += [
            f"stages: the name {n!r} must be up to 100 letters, digits and _, as a folder's"
            for n in names
            if not STAGE_NAME.fullmatch(n)
        ]
        return found
