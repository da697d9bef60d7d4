"""The recipe of a cascade: stages in order, scores, alarms and teachers."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemocascade.recipe.graph import StageConfig, StageGraph, StageRecipe
from nemocascade.recipe.rl import PolicyRecipe
from nemocascade.recipe.scores import ScoreConfig


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

    stages: tuple[StageConfig[StageRecipe], ...] = ()
    """In the order in which they run."""

    scores: ScoreConfig = field(default_factory=ScoreConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    teachers: TeacherChoice = field(default_factory=TeacherChoice)

    keep_checkpoints: bool = False
    """Keep the checkpoints of stages that are done. Their artifacts stay either way."""

    @property
    def graph(self) -> StageGraph:
        """The stages by name, with what each starts from."""
        return StageGraph(self.run_dir, self.stages)

    def problems(self, world_size: int) -> list[str]:
        """Every rule that the cascade or one of its stages breaks, each with a remedy."""
        graph = self.graph
        found = graph.problems()
        if not self.alarm.drop > 0:
            found.append(f"alarm.drop({self.alarm.drop}) must be above 0 points")
        if found:
            # Without an order, what a stage starts from is not known.
            return found
        found += self.scores.problems(world_size, graph.model_of(graph.names[0]))
        found += self._teacher_problems()
        for name in graph.names:
            recipe = graph.resolved(name)
            if isinstance(recipe, PolicyRecipe):
                broken = recipe.problems(world_size, graph.model_of(name))
            else:
                broken = recipe.problems(world_size)
            found += [f"stages.{name}: {problem}" for problem in broken]
        return found

    def _teacher_problems(self) -> list[str]:
        """Domains that nobody can teach, and pins that name no stage or no open domain."""
        graph = self.graph
        scored = {d.domain for d in self.scores.domains}
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
