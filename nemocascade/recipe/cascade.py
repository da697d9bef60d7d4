"""The recipe of a cascade: stages in order, what each starts from, scores, alarms and teachers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from nemocascade.recipe.model import ModelConfig
from nemocascade.recipe.mopd import MopdRecipe, TeacherConfig
from nemocascade.recipe.rl import GrpoRecipe, PolicyRecipe
from nemocascade.recipe.scores import ScoreConfig, repeated
from nemocascade.recipe.sft import SftRecipe

StageRecipe = SftRecipe | GrpoRecipe | MopdRecipe
StageKind = Literal["sft", "grpo", "mopd"]


@dataclass(frozen=True)
class StageConfig:
    """One stage of a cascade."""

    name: str
    """Its folder is RUN/stages/NAME."""

    recipe: StageRecipe
    """Of the stage. The cascade sets its `run_dir`, its `init_from`, and the teachers that it
    leaves open; layout, steps and all else are its own."""

    start: str = ""
    """Stage before it whose artifact it starts from; empty = the main line's last one before it.
    The first stage starts as its recipe says."""

    side: bool = False
    """A side branch, such as a teacher's: the main line does not go through it."""

    @property
    def kind(self) -> StageKind:
        """By its recipe."""
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

    stages: tuple[StageConfig, ...] = ()
    """In the order in which they run."""

    scores: ScoreConfig = field(default_factory=ScoreConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    teachers: TeacherChoice = field(default_factory=TeacherChoice)

    keep_checkpoints: bool = False
    """Keep the checkpoints of stages that are done. Their artifacts stay either way."""

    @property
    def names(self) -> list[str]:
        """Of the stages, in order."""
        return [s.name for s in self.stages]

    def stage(self, name: str) -> StageConfig:
        """By name. Raises KeyError."""
        return {s.name: s for s in self.stages}[name]

    def before(self, name: str) -> list[StageConfig]:
        """The stages that run before the named one."""
        return list(self.stages[: self.names.index(name)])

    def start_of(self, name: str) -> str:
        """The stage that the named one starts from; empty = its recipe's own start."""
        if start := self.stage(name).start:
            return start
        main = [s.name for s in self.before(name) if not s.side]
        return main[-1] if main else ""

    def stage_dir(self, name: str) -> str:
        """Run folder of a stage."""
        return f"{self.run_dir}/stages/{name}"

    def artifact_dir(self, name: str) -> str:
        """Where a stage leaves its artifact."""
        return f"{self.stage_dir(name)}/artifact"

    def resolved(
        self, name: str, *, tokenizer: str = "", teachers: Mapping[str, str] | None = None
    ) -> StageRecipe:
        """The recipe of a stage as it runs here.

        tokenizer: of the artifact it starts from; an SFT stage in mid-cascade keeps it. teachers:
        artifact by domain; without, open ones are filled with the start, to be looked at only.
        """
        recipe, start = self.stage(name).recipe, self.start_of(name)
        recipe = replace(recipe, run_dir=self.stage_dir(name), resume=True)
        if not start:
            return recipe
        recipe = replace(recipe, init_from=self.artifact_dir(start))
        if isinstance(recipe, SftRecipe) and not recipe.tokenizer.path:
            recipe = replace(recipe, tokenizer=replace(recipe.tokenizer, path=tokenizer))
        if isinstance(recipe, MopdRecipe):
            named = {t.domain: t.artifact for t in recipe.teachers}
            known = teachers or {}
            taught = [d.domain for d in recipe.domains]
            filled = tuple(
                TeacherConfig(d, named.get(d) or known.get(d, self.artifact_dir(start)))
                # A teacher of no domain of the recipe stays, to be complained of.
                for d in [*taught, *(d for d in named if d not in taught)]
            )
            recipe = replace(recipe, teachers=filled)
        return recipe

    def open_teachers(self, name: str) -> list[str]:
        """Domains of a stage whose teacher the cascade chooses; none for other kinds than MOPD."""
        recipe = self.stage(name).recipe
        if not isinstance(recipe, MopdRecipe):
            return []
        named = {t.domain for t in recipe.teachers if t.artifact}
        return [d.domain for d in recipe.domains if d.domain not in named]

    def model_of(self, name: str) -> ModelConfig | None:
        """Shape of a stage's model; None where it is that of an artifact from outside."""
        while start := self.start_of(name):
            name = start
        recipe = self.stage(name).recipe
        return recipe.model if isinstance(recipe, SftRecipe) else None

    def problems(self, world_size: int) -> list[str]:
        """Every rule that the cascade or one of its stages breaks, each with a remedy."""
        found = self.order_problems()
        if not self.alarm.drop > 0:
            found.append(f"alarm.drop({self.alarm.drop}) must be above 0 points")
        if found:
            # Without an order, what a stage starts from is not known.
            return found
        found += self.scores.problems(world_size, self.model_of(self.names[0]))
        found += self._teacher_problems()
        for stage in self.stages:
            recipe = self.resolved(stage.name)
            if isinstance(recipe, PolicyRecipe):
                broken = recipe.problems(world_size, self.model_of(stage.name))
            else:
                broken = recipe.problems(world_size)
            found += [f"stages.{stage.name}: {problem}" for problem in broken]
        return found

    def order_problems(self) -> list[str]:
        """Why the stages cannot run one after the other."""
        if not self.stages:
            return ["stages is empty: name at least one"]
        found = [f"stages: {n!r} stands twice: rename one" for n in repeated(self.names)]
        found += [
            f"stages: the name {n!r} must be letters, digits and _, as a folder's"
            for n in self.names
            if not re.fullmatch(r"[A-Za-z]\w*", n, flags=re.ASCII)
        ]
        if found:
            return found
        starts = {s.name: s.start for s in self.stages if s.start}
        for number, stage in enumerate(self.stages):
            if not stage.start or stage.start in self.names[:number]:
                continue
            if stage.start not in self.names:
                known = ", ".join(self.names[:number]) or "none"
                found.append(
                    f"stages.{stage.name}.start({stage.start!r}) is no stage: use one before it "
                    f"({known}), or leave it empty"
                )
            elif stage.name in _chain(starts, stage.start):
                found.append(
                    f"stages.{stage.name}.start({stage.start!r}): the two start from each other "
                    f"({' <- '.join([stage.name, *_chain(starts, stage.start)])}): break the circle"
                )
            else:
                found.append(
                    f"stages.{stage.name}.start({stage.start!r}) runs after it: move "
                    f"{stage.start} before {stage.name}"
                )
        if self.stages[0].side:
            found.append(f"stages.{self.names[0]} is first, so it cannot be a side branch")
        return found

    def _teacher_problems(self) -> list[str]:
        scored = {d.domain for d in self.scores.domains}
        found = []
        taught = set()
        for name in self.names:
            open_ = self.open_teachers(name)
            earlier = [s.name for s in self.before(name)]
            taught |= set(open_)
            if open_ and not earlier:
                found.append(
                    f"stages.{name} is first, so no artifact can teach {', '.join(open_)}: name "
                    "teachers with their artifacts, or put a stage before it"
                )
                continue
            for domain in open_:
                pin = self.teachers.pinned.get(domain)
                if pin is None and domain not in scored:
                    found.append(
                        f"stages.{name}: the teacher of {domain} cannot be chosen, for nothing "
                        f"scores that domain: add it to scores.domains, or pin teachers.pinned"
                    )
                elif pin is not None and pin not in earlier:
                    found.append(
                        f"teachers.pinned: {domain} is pinned to {pin!r}, which is no stage before "
                        f"{name}: use one of {', '.join(earlier)}"
                    )
        found += [
            f"teachers.pinned names {domain}, which no MOPD stage leaves open: take it out"
            for domain in sorted(set(self.teachers.pinned) - taught)
        ]
        return found


def _chain(starts: Mapping[str, str], name: str) -> list[str]:
    """`name`, what it starts from, and so on, to the end or to where a circle closes."""
    found = [name]
    while (before := starts.get(found[-1], "")) and before not in found:
        found.append(before)
    return found
