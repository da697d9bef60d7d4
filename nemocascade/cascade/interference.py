"""Measures what each RL stage does to every domain: side branches from one artifact."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nemocascade.cascade.decide import decide
from nemocascade.cascade.effects import (
    FILE,
    FOLDER,
    VERSION,
    Branch,
    Effect,
    Effects,
    Interference,
)
from nemocascade.cascade.graph import StageChoice, StageGraph
from nemocascade.cascade.inputs import FileHashes, score_files
from nemocascade.cascade.records import SCORES, read_record, write_json
from nemocascade.cascade.report.effects import sentences, table
from nemocascade.cascade.run import run_cascade
from nemocascade.megatron.artifact import read_artifact
from nemocascade.recipe import (
    CascadeRecipe,
    GrpoRecipe,
    Recipe,
    RecipeError,
    ScoreConfig,
    StageConfig,
    StageRecipe,
)
from nemocascade.recipe.commands import InterferenceSettings
from nemocascade.recipe.scores import repeated
from nemocascade.runtime.jsonl import json_text
from nemocascade.runtime.launcher import is_main_process
from nemocascade.runtime.logging import printable
from nemocascade.runtime.run_lock import RunLock
from nemocascade.stages.scoring import Scores, read_scores, score_artifact, settings_key
from nemocascade.stages.setup import on_main_rank


@dataclass(frozen=True)
class BranchPlan:
    """Branches of a measurement: a cascade of side branches that start from one artifact.

    start: stage of that artifact; empty if `artifact` is an external one. sequences: stages and
    number of the seed, by the name of their branch.
    """

    cascade: CascadeRecipe
    start: str
    artifact: str
    order: tuple[str, ...]
    sequences: dict[str, tuple[tuple[str, ...], int]]


def plan_branches(cascade: CascadeRecipe, settings: InterferenceSettings) -> BranchPlan:
    """The branches of a measurement. Raises RecipeError with every invalid setting."""
    graph = StageGraph(cascade)
    if problems := graph.problems():
        raise RecipeError(problems)
    stages = tuple(settings.stages) or tuple(
        s.name for s in cascade.stages if isinstance(s.recipe, GrpoRecipe) and not s.side
    )
    if problems := _problems(graph, stages, settings):
        raise RecipeError(problems)
    order = tuple(name for name in graph.names if name in stages)
    start = settings.start or graph.start_of(order[0])
    artifact = graph.artifact_dir(start) if start else graph.stage(order[0]).recipe.init_from
    if not artifact:
        raise RecipeError(
            [f"stages.{order[0]} starts from no artifact: name the one with --start STAGE"]
        )
    sequences: dict[str, tuple[tuple[str, ...], int]] = {}
    branches: list[StageConfig[StageRecipe]] = []
    for number in range(settings.seeds):
        suffix = f"_seed_{number + 1}" if number else ""

        def branch(before: str, name: str, full: str, number: int = number) -> None:
            recipe = graph.stage(name).recipe
            recipe = replace(
                recipe,
                steps=settings.steps or recipe.steps,
                seed=recipe.seed + number,
                init_from="" if before else artifact,
            )
            branches.append(StageConfig(full, recipe, start=before, side=True))

        for name in order:
            branch("", name, f"{name}{suffix}")
            sequences[f"{name}{suffix}"] = (name,), number
        for first, second in itertools.permutations(order, 2) if settings.pairs else ():
            full = f"{first}_then_{second}{suffix}"
            branch(f"{first}{suffix}", second, full)
            sequences[full] = (first, second), number
    side = CascadeRecipe(
        run_dir=f"{cascade.run_dir}/{FOLDER}",
        stages=tuple(branches),
        scores=_scores(cascade.scores, settings.samples),
        alarm=replace(cascade.alarm, stop=False),
        keep_checkpoints=cascade.keep_checkpoints,
    )
    return BranchPlan(side, start, artifact, order, sequences)


def _problems(
    graph: StageGraph, stages: Sequence[str], settings: InterferenceSettings
) -> list[str]:
    known = {s.name: s for s in graph.cascade.stages}
    trainable = [n for n, s in known.items() if isinstance(s.recipe, GrpoRecipe)]
    allowed = ", ".join(trainable) or "none"
    found = [f"--stages names {name} twice" for name in repeated(stages)]
    for name in dict.fromkeys(stages):
        if name not in known:
            found.append(
                f"--stages {name!r} is not a stage: use RL stages of the cascade ({allowed})"
            )
        elif name not in trainable:
            found.append(
                f"--stages {name} is {known[name].kind}: only RL stages (GRPO) are measured; use "
                f"some of {allowed}"
            )
    if not stages:
        found.append("the cascade has no RL stage (GRPO): there is nothing to measure")
    if settings.pairs and len(stages) == 1:
        found.append(f"--pairs needs two stages, and there is only {stages[0]}: name another")
    if settings.start and settings.start not in known:
        found.append(f"--start {settings.start!r} is not a stage: use one of {', '.join(known)}")
    return found


def _scores(config: ScoreConfig, samples: int) -> ScoreConfig:
    """The recipe's scores, with `samples` of each task, unless that is 0."""
    if not samples:
        return config
    domains = tuple(replace(d, samples=samples) for d in config.domains)
    return replace(config, domains=domains, samples=samples)


def measure_interference(cascade: CascadeRecipe, settings: InterferenceSettings) -> Effects:
    """Train and score the branches that are missing, and write interference.json; every rank calls
    it. Finished stages of the cascade with the same inputs serve as branches, and keep their own
    scores, whatever `cascade.scores` says.

    Raises RecipeError for invalid settings, and as `run_cascade`.
    """
    plan = plan_branches(cascade, settings)
    graph = StageGraph(cascade)
    chain = [plan.start] if plan.start else []
    while chain and (before := graph.start_of(chain[0])):
        chain.insert(0, before)
    lock = RunLock(Path(plan.cascade.run_dir))
    main = partial(on_main_rank, lock, cascade.scores.engine)
    try:
        for name in chain:
            if not main(partial(_is_current, cascade, name)):
                run_cascade(cascade, StageChoice(only=name))
        reused: dict[str, str] = main(lambda: _finished(cascade, plan))
        scored = {"": plan.artifact, **reused}
        for name, artifact in scored.items():
            _score(plan, Path(artifact), _score_folder(plan, name), main)
    finally:
        lock.release()
    if rest := _without(plan.cascade, reused):
        run_cascade(rest)
    try:
        effects: Effects = main(lambda: _write(plan, cascade, reused))
    finally:
        lock.release()
    return effects


def _is_current(cascade: CascadeRecipe, name: str) -> bool:
    """True if a stage of the cascade is done, and nothing that it depends on has changed."""
    files = FileHashes(Path(cascade.run_dir) / "files.json")
    return decide(cascade, name, files).action == "keep"


def _finished(cascade: CascadeRecipe, plan: BranchPlan) -> dict[str, str]:
    """Artifacts of the cascade's finished stages that are the same as a branch, by branch."""
    files = FileHashes(Path(plan.cascade.run_dir) / "files.json")
    graph = StageGraph(cascade)
    done = {}
    for name in graph.names:
        record = read_record(Path(graph.stage_dir(name)))
        if record is not None and record.status == "done":
            done[record.key] = graph.artifact_dir(name)
    found = {}
    for name, (stages, _) in plan.sequences.items():
        if len(stages) == 1 and (artifact := done.get(decide(plan.cascade, name, files).key)):
            found[name] = artifact
    return found


def _without(cascade: CascadeRecipe, reused: dict[str, str]) -> CascadeRecipe | None:
    """The branches that run: all but the reused ones, whose artifacts later branches start from."""
    stages = tuple(
        replace(s, start="", recipe=replace(s.recipe, init_from=reused[s.start]))
        if s.start in reused
        else s
        for s in cascade.stages
        if s.name not in reused
    )
    return replace(cascade, stages=stages) if stages else None


def _score_folder(plan: BranchPlan, branch: str) -> Path:
    """Folder of the scores of a reused artifact; "" is the start."""
    return Path(plan.cascade.run_dir) / "reused" / (branch or "start")


def _score(plan: BranchPlan, artifact: Path, folder: Path, main: Any) -> None:
    """Score an artifact of the cascade into `folder`, unless its scores are there already."""
    config = plan.cascade.scores

    def check() -> tuple[str, bool]:
        files = FileHashes(Path(plan.cascade.run_dir) / "files.json")
        key = settings_key(config, files.of(score_files(config)))
        digest = read_artifact(artifact).digest
        for path in (folder / SCORES, artifact.parent / SCORES):
            found = read_scores(path)
            if found and (found.digest, found.settings) == (digest, key) and _has_tasks(found):
                write_json(folder / SCORES, found.as_json())
                return key, True
        return key, False

    key, known = main(check)
    if not known:
        scores = score_artifact(artifact, config, folder, settings=key)
        main(partial(write_json, folder / SCORES, scores.as_json()))


def _has_tasks(scores: Scores) -> bool:
    return all(score.task_means for score in scores.scores.values())


def _write(plan: BranchPlan, cascade: CascadeRecipe, reused: dict[str, str]) -> Effects:
    """Write interference.json from the branches' scores."""
    graph, side = StageGraph(cascade), StageGraph(plan.cascade)

    def tasks_of(branch: str) -> dict[str, list[float | None]]:
        own = branch and branch not in reused
        folder = Path(side.stage_dir(branch)) if own else _score_folder(plan, branch)
        found = read_scores(folder / SCORES)
        assert found is not None, folder
        return {domain: score.task_means for domain, score in found.scores.items()}

    effects = Effects(
        Interference(
            start=plan.start or plan.artifact,
            digest=read_artifact(Path(plan.artifact)).digest,
            order=list(plan.order),
            steps={s.name: s.recipe.steps for s in plan.cascade.stages if s.name in plan.order},
            trains={name: [d.domain for d in _policy(graph, name).domains] for name in plan.order},
            base=tasks_of(""),
            branches=[
                Branch(list(stages), number, tasks_of(name))
                for name, (stages, number) in plan.sequences.items()
            ],
        )
    )
    write_json(Path(plan.cascade.run_dir) / FILE, as_json(effects))
    return effects


def _policy(graph: StageGraph, name: str) -> GrpoRecipe:
    recipe = graph.stage(name).recipe
    assert isinstance(recipe, GrpoRecipe)
    return recipe


def print_interference(recipe: Recipe, settings: InterferenceSettings) -> None:
    """Measure a cascade's matrix, and print it as a table with sentences, or as JSON."""
    if not isinstance(recipe, CascadeRecipe):
        raise RecipeError([f"{settings.recipe} is the recipe of one stage: name that of a cascade"])
    run_dir = Path.cwd() / recipe.run_dir
    found = measure_interference(replace(recipe, run_dir=str(run_dir)), settings)
    if not is_main_process():
        return
    if settings.json:
        print(json_text(as_json(found)))
    else:
        print(printable("\n".join([table(found), "", *sentences(found)])))
        print(f"page: nemocascade report {run_dir}")


def as_json(effects: Effects) -> dict[str, Any]:
    """The content of interference.json: the measurement, and what follows from it."""

    def cells(found: Sequence[Effect]) -> dict[str, Any]:
        return {d: asdict(e) for d, e in zip(effects.domains, found, strict=True)}

    return {
        "version": VERSION,
        "measured": asdict(effects.measured),
        "seeds": effects.seeds,
        "alone": {name: cells(found) for name, found in effects.alone.items()},
        "second": [
            {"first": a, "second": b, "effects": cells(found)}
            for (a, b), found in effects.second.items()
        ],
        "words": sentences(effects),
    }
