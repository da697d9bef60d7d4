"""The stages of a cascade as a graph: order, what each starts from, and the recipe it runs with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from nemocascade.recipe.model import ModelConfig
from nemocascade.recipe.mopd import MopdRecipe, TeacherConfig
from nemocascade.recipe.rl import GrpoRecipe
from nemocascade.recipe.scores import repeated
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


Stages = tuple[StageConfig[StageRecipe], ...]


@dataclass(frozen=True)
class StageGraph:
    """Stages in the order in which they run, and the artifacts that connect them."""

    run_dir: str
    stages: Stages

    @property
    def names(self) -> list[str]:
        """Names of the stages, in order."""
        return [s.name for s in self.stages]

    def stage(self, name: str) -> StageConfig[StageRecipe]:
        """The stage of that name. Raises KeyError."""
        return {s.name: s for s in self.stages}[name]

    def before(self, name: str) -> Stages:
        """The stages that run before the named one."""
        return self.stages[: self.names.index(name)]

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
        """Folder of a stage's artifact."""
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

    def problems(self) -> list[str]:
        """Reasons why the stages cannot run one after the other."""
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
        found = [problem for s in self.stages if (problem := self._start_problem(s))]
        if self.stages[0].side:
            found.append(f"stages.{self.names[0]} is first, so it cannot be a side branch")
        return found

    def _start_problem(self, stage: StageConfig[StageRecipe]) -> str:
        """Reason why a stage cannot start from the one it names; empty if it can."""
        earlier = [s.name for s in self.before(stage.name)]
        if not stage.start or stage.start in earlier:
            return ""
        named = f"stages.{stage.name}.start({stage.start!r})"
        if stage.start not in self.names:
            return (
                f"{named} is no stage: use one before it ({', '.join(earlier) or 'none'}), or "
                "leave it empty"
            )
        chain = self._chain(stage.start)
        if stage.name in chain:
            return (
                f"{named}: the two start from each other "
                f"({' <- '.join([stage.name, *chain])}): break the circle"
            )
        return f"{named} runs after it: move {stage.start} before {stage.name}"

    def _chain(self, name: str) -> list[str]:
        """The stage, the one it names as its start, and so on, to the end or to where a circle
        closes."""
        starts = {s.name: s.start for s in self.stages if s.start}
        found = [name]
        while (before := starts.get(found[-1], "")) and before not in found:
            found.append(before)
        return found
