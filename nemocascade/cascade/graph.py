"""Graph of a cascade's stages: their order, start artifacts and resolved recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from nemocascade.recipe import (
    CascadeRecipe,
    ModelConfig,
    MopdRecipe,
    PolicyRecipe,
    SftRecipe,
    StageConfig,
    StageRecipe,
    TeacherConfig,
)
from nemocascade.recipe.rules import number_problems


@dataclass(frozen=True)
class StageGraph:
    """Stages in execution order, and the artifacts that connect them."""

    cascade: CascadeRecipe

    @property
    def names(self) -> list[str]:
        """Names of the stages, in execution order."""
        return [s.name for s in self.cascade.stages]

    def stage(self, name: str) -> StageConfig[StageRecipe]:
        """The stage of that name. Raises KeyError."""
        return {s.name: s for s in self.cascade.stages}[name]

    def before(self, name: str) -> tuple[StageConfig[StageRecipe], ...]:
        """Stages that run before the named one."""
        return self.cascade.stages[: self.names.index(name)]

    def start_of(self, name: str) -> str:
        """Name of the stage that the named one starts from; empty = its recipe's own start."""
        if start := self.stage(name).start:
            return start
        main = [s.name for s in self.before(name) if not s.side]
        return main[-1] if main else ""

    def stage_dir(self, name: str) -> str:
        """Run folder of a stage."""
        return f"{self.cascade.run_dir}/stages/{name}"

    def artifact_dir(self, name: str) -> str:
        """Folder of a stage's artifact."""
        return f"{self.stage_dir(name)}/artifact"

    def resolved(
        self, name: str, *, tokenizer: str = "", teachers: Mapping[str, str] | None = None
    ) -> StageRecipe:
        """Recipe of a stage with its run folder, start artifact and teachers filled in.

        tokenizer: tokenizer of the start artifact; a later SFT stage keeps it. teachers: artifact
        by domain; if None, the start artifact stands in for open teachers, for validation only.
        Changes are accepted: the cascade compares inputs by content before it resumes a stage.
        """
        recipe, start = self.stage(name).recipe, self.start_of(name)
        recipe = replace(recipe, run_dir=self.stage_dir(name), resume=True, accept_changes=True)
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
                # Keep teachers of unknown domains, so that validation reports them.
                for d in [*taught, *(d for d in named if d not in taught)]
            )
            recipe = replace(recipe, teachers=filled)
        return recipe

    def open_teachers(self, name: str) -> list[str]:
        """Domains of a stage whose teacher the cascade chooses; empty unless it is MOPD."""
        recipe = self.stage(name).recipe
        if not isinstance(recipe, MopdRecipe):
            return []
        named = {t.domain for t in recipe.teachers if t.artifact}
        return [d.domain for d in recipe.domains if d.domain not in named]

    def model_of(self, name: str) -> ModelConfig | None:
        """Shape of a stage's model; None if it comes from an external artifact."""
        while start := self.start_of(name):
            name = start
        recipe = self.stage(name).recipe
        return recipe.model if isinstance(recipe, SftRecipe) else None

    def problems(self) -> list[str]:
        """Reasons why the stages cannot run in order."""
        if found := self.cascade.name_problems():
            return found
        found = [problem for s in self.cascade.stages if (problem := self._start_problem(s))]
        first = self.cascade.stages[0]
        if first.side and not first.recipe.init_from:
            found.append(
                f"stages.{first.name} is first, so it cannot be a side branch, unless its recipe "
                "names the artifact that it starts from (init_from)"
            )
        return found

    def _start_problem(self, stage: StageConfig[StageRecipe]) -> str:
        """Reason why a stage cannot start from the stage it names; empty if it can."""
        earlier = [s.name for s in self.before(stage.name)]
        if not stage.start or stage.start in earlier:
            return ""
        named = f"stages.{stage.name}.start({stage.start!r})"
        if stage.start not in self.names:
            return (
                f"{named} is not a stage: use one before it ({', '.join(earlier) or 'none'}), or "
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
        """The stage and its chain of explicit starts, until it ends or a cycle closes."""
        starts = {s.name: s.start for s in self.cascade.stages if s.start}
        found = [name]
        while (before := starts.get(found[-1], "")) and before not in found:
            found.append(before)
        return found


def cascade_problems(cascade: CascadeRecipe, world_size: int) -> list[str]:
    """Every rule that the cascade or one of its stages breaks, each with a remedy."""
    graph = StageGraph(cascade)
    if found := graph.problems() + number_problems(cascade.alarm, "alarm"):
        # Without a valid order the start of a stage is undefined.
        return found
    found = cascade.scores.problems(world_size, graph.model_of(graph.names[0]))
    found += _teacher_problems(graph)
    for name in graph.names:
        recipe = graph.resolved(name)
        if isinstance(recipe, PolicyRecipe):
            broken = recipe.problems(world_size, graph.model_of(name))
        else:
            broken = recipe.problems(world_size)
        found += [f"stages.{name}: {problem}" for problem in broken]
    return found


def _teacher_problems(graph: StageGraph) -> list[str]:
    """Domains without a possible teacher, and pins that name no stage or no open domain."""
    # Scores are found by their names.
    scored = {d.domain for d in graph.cascade.scores.domains if d.label == d.domain}
    pinned = graph.cascade.teachers.pinned
    found = []
    taught = set()
    for name in graph.names:
        open_ = graph.open_teachers(name)
        earlier = [s.name for s in graph.before(name)]
        taught |= set(open_)
        if open_ and not earlier:
            found.append(
                f"stages.{name} is first, so no artifact can teach {', '.join(open_)}: name "
                "teachers with their artifacts, or put a stage before it"
            )
            continue
        for domain in open_:
            pin = pinned.get(domain)
            if pin is None and domain not in scored:
                found.append(
                    f"stages.{name}: the teacher of {domain} cannot be chosen, for no score has "
                    f"that name: add the domain to scores.domains, or pin teachers.pinned"
                )
            elif pin is not None and pin not in earlier:
                found.append(
                    f"teachers.pinned: {domain} is pinned to {pin!r}, which is not a stage before "
                    f"{name}: use one of {', '.join(earlier)}"
                )
    found += [
        f"teachers.pinned names {domain}, which no MOPD stage leaves open: take it out"
        for domain in sorted(set(pinned) - taught)
    ]
    return found


@dataclass(frozen=True)
class StageChoice:
    """Selection of the stages that run.

    begin: first stage to run; earlier stages are used as they are, even if they are stale.
    only: single stage to run. again: run the stage of `begin` or `only` even if nothing has
    changed; its old folder is retired.
    """

    begin: str = ""
    only: str = ""
    again: bool = False

    def problems(self, cascade: CascadeRecipe) -> list[str]:
        """Contradictions and unknown names in the selection."""
        names = StageGraph(cascade).names
        found = [
            f"--{option} {name!r} is not a stage: use one of {', '.join(names)}"
            for option, name in (("from", self.begin), ("only", self.only))
            if name and name not in names
        ]
        if self.begin and self.only:
            found.append("--from and --only name different things to run: give one of them")
        if self.again and not (self.begin or self.only):
            found.append("--again needs --from or --only: which stage is to run anew?")
        return found

    def stages(self, cascade: CascadeRecipe) -> list[str]:
        """Names of the selected stages, in execution order."""
        if self.only:
            return [self.only]
        names = StageGraph(cascade).names
        return names[names.index(self.begin) if self.begin else 0 :]

    def anew(self, name: str) -> bool:
        """True if this stage runs even if nothing has changed."""
        return self.again and name == (self.only or self.begin)
