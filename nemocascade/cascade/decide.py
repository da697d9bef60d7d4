"""Decides if a stage runs, with which inputs, and why. Reads files and changes none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nemocascade.cascade.errors import CascadeError
from nemocascade.cascade.graph import StageGraph
from nemocascade.cascade.inputs import FileHashes, differences, key_of, stage_inputs
from nemocascade.cascade.records import StageRecord, Teacher, done_scores, read_record
from nemocascade.megatron.artifact import read_artifact, verify_artifact
from nemocascade.megatron.checkpoint import (
    CheckpointError,
    complete_checkpoints,
    latest_checkpoint,
)
from nemocascade.recipe import CascadeRecipe, MopdRecipe, StageConfig, StageRecipe
from nemocascade.recipe.changes import at_default
from nemocascade.stages.scoring import Scores
from nemocascade.stages.teacher_scores import TaughtDomain, teacher_warning
from nemocascade.types import Artifact

Action = Literal["keep", "run", "resume"]


@dataclass(frozen=True)
class Decision:
    """The decision about a stage.

    action: `keep` the finished stage, `run` it from its start, or `resume` it. reasons: readable
    reasons for the action. recipe: the resolved recipe; None if an earlier stage must run first.
    retire: the content of the stage's folder was made from other inputs and is moved to `retired/`.
    warning: about teachers from which the student cannot improve; empty without one.
    """

    stage: str
    action: Action
    reasons: tuple[str, ...]
    recipe: StageRecipe | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    teachers: dict[str, Teacher] = field(default_factory=dict)
    retire: bool = False
    warning: str = ""

    def text(self, label: str = "") -> str:
        """Summary line, then a line for each reason and each teacher. label: the stage's place and
        name."""
        head = f"{label or self.stage}: {self.action}"
        if self.retire:
            head += ", and its old folder is kept under retired/"
        lines = [head, *(f"  - {reason}" for reason in self.reasons)]
        for domain, teacher in self.teachers.items():
            lines.append(f"  - {domain} is taught by {describe_teacher(teacher)}")
        return "\n".join(lines)


def describe_teacher(teacher: Teacher) -> str:
    """Name of a teacher and the reason for its choice."""
    if not teacher.stage:
        return f"{teacher.artifact}, as its recipe says"
    score = "" if teacher.score is None else f", score {teacher.score:.3f}"
    return f"{teacher.stage}{score}{', pinned' if teacher.pinned else ''}"


def decide(
    cascade: CascadeRecipe,
    name: str,
    files: FileHashes,
    *,
    pending: Collection[str] = (),
    again: bool = False,
    verify: bool = False,
) -> Decision:
    """Decide if a stage is kept, run or resumed.

    pending: in a dry run, earlier stages that will have run by then. again: run the stage even if
    nothing has changed. verify: check the hash of a kept artifact's weights; otherwise the stage
    that reads them does.

    Raises CascadeError if a stage that it depends on has no artifact.
    """
    graph = StageGraph(cascade)
    stage = graph.stage(name)
    waits = _waits_for(graph, stage, pending)
    if waits:
        return Decision(name, "run", (f"after {', '.join(waits)}, which run before it",))
    start = graph.start_of(name)
    parent = _artifact_of(graph, name, start) if start else None
    teachers = _teachers(graph, stage)
    recipe = graph.resolved(
        name,
        tokenizer=str(parent.tokenizer_path or "") if parent else "",
        teachers={domain: t.artifact for domain, t in teachers.items()},
    )
    inputs = stage_inputs(
        recipe,
        parent.digest if parent else _digest(recipe.init_from),
        {domain: _digest(t.artifact) for domain, t in teachers.items()},
        files,
    )
    action, reasons, retire = _compare(recipe, inputs, again=again, verify=verify)
    return Decision(
        name,
        action,
        reasons,
        recipe,
        inputs,
        key_of(inputs),
        teachers,
        retire,
        _teacher_warning(graph, name, teachers) if action != "keep" else "",
    )


def _waits_for(
    graph: StageGraph, stage: StageConfig[StageRecipe], pending: Collection[str]
) -> list[str]:
    """Pending stages whose artifacts or scores the stage depends on."""
    needed = {graph.start_of(stage.name)}
    for domain in graph.open_teachers(stage.name):
        pin = graph.cascade.teachers.pinned.get(domain)
        needed |= {pin} if pin else {s.name for s in graph.before(stage.name)}
    return [name for name in graph.names if name in needed and name in pending]


def _compare(
    recipe: StageRecipe, inputs: dict[str, Any], *, again: bool, verify: bool
) -> tuple[Action, tuple[str, ...], bool]:
    """The action, its reasons, and True if the folder must be retired."""
    folder = Path(recipe.run_dir)
    record = read_record(folder)
    if record is None:
        if complete_checkpoints(folder / "checkpoints") or (folder / "artifact").exists():
            return "run", ("its folder holds a run that no cascade has a record of",), True
        return "run", ("it has not run yet",), False
    if changed := differences(record.inputs, inputs, at_default(recipe)):
        return "run", tuple(f"changed: {line}" for line in changed), True
    if again:
        return "run", ("it was asked for again",), True
    if record.status != "done":
        newest = latest_checkpoint(folder / "checkpoints")
        found = f"from {newest.name}" if newest else "from its start: no checkpoint was finished"
        return "resume", (f"it was stopped; it resumes {found}",), False
    if problem := _damage(folder, record, verify=verify):
        return "run", (problem,), True
    return "keep", ("done, and nothing that it depends on has changed",), False


def _damage(folder: Path, record: StageRecord, *, verify: bool) -> str:
    """Reason why the artifact of a finished stage cannot be used; empty if it can.

    Raises CheckpointError if its file system cannot be read now.
    """
    try:
        found = (verify_artifact if verify else read_artifact)(folder / "artifact")
    except CheckpointError as error:
        if error.may_pass:
            raise  # a file server that does not answer is not a reason to train again
        return f"its artifact is damaged: {'; '.join(error.problems)}"
    if found.digest != record.artifact_digest:
        return (
            f"its artifact is {found.digest[:12]}, and {record.artifact_digest[:12]} was left here"
        )
    return ""


def _artifact_of(graph: StageGraph, name: str, source: str) -> Artifact:
    """Artifact of stage `source`, which stage `name` depends on. Raises CascadeError if missing."""
    folder = Path(graph.stage_dir(source))
    record = read_record(folder)
    if record is None or record.status != "done":
        raise CascadeError(
            f"stage {name} needs the artifact of {source}, which is not done: run {source} first, "
            f"with --only {source}, or without --only and --from"
        )
    return read_artifact(folder / "artifact")


def _teachers(graph: StageGraph, stage: StageConfig[StageRecipe]) -> dict[str, Teacher]:
    """Teacher of each domain of an MOPD stage, including the teachers that its recipe names."""
    if not isinstance(stage.recipe, MopdRecipe):
        return {}
    open_ = graph.open_teachers(stage.name)
    chosen = choose_teachers(graph.cascade, stage.name, done_scores(graph.cascade)) if open_ else {}
    for domain in open_:
        source = chosen[domain].stage
        _artifact_of(graph, stage.name, source)
    named = {t.domain: t.artifact for t in stage.recipe.teachers if t.artifact}
    found = {}
    for domain in (d.domain for d in stage.recipe.domains):
        outside = Teacher("", named.get(domain, ""), None, pinned=True)
        found[domain] = chosen.get(domain, outside)
    return found


def _teacher_warning(graph: StageGraph, name: str, teachers: Mapping[str, Teacher]) -> str:
    """Warning about a stage's teachers by their scores and its start's; empty without one."""
    recipe, start = graph.stage(name).recipe, graph.start_of(name)
    if not isinstance(recipe, MopdRecipe):
        return ""
    before = done_scores(graph.cascade).get(start)
    whole = sum(d.share for d in recipe.domains)
    return teacher_warning(
        (
            TaughtDomain(
                domain=d.domain,
                share=d.share / whole,
                teacher=teachers[d.domain].stage or teachers[d.domain].artifact,
                teacher_score=teachers[d.domain].score,
                student_score=before.of(d.domain) if before else None,
                is_start=bool(start) and teachers[d.domain].stage == start,
            )
            for d in recipe.domains
        ),
        "--teachers.pinned DOMAIN STAGE",
    )


def choose_teachers(
    cascade: CascadeRecipe, name: str, scores: Mapping[str, Scores]
) -> dict[str, Teacher]:
    """The teacher of every domain that stage `name` leaves open: the pinned one, else the earlier
    artifact with the best score.

    Ties go to the artifact that the stage starts from, which preserves its behaviour on the domain;
    otherwise to the latest stage. Raises CascadeError for a domain that has no score.
    """
    graph = StageGraph(cascade)
    start = graph.start_of(name)
    earlier = [s.name for s in graph.before(name)]
    found = {}
    for domain in graph.open_teachers(name):
        by_stage = {s: scores[s].of(domain) for s in earlier if s in scores}
        pin = cascade.teachers.pinned.get(domain)
        if pin:
            best = pin
        else:
            candidates = [
                (score, stage == start, earlier.index(stage), stage)
                for stage, score in by_stage.items()
                if score is not None
            ]
            if not candidates:
                raise CascadeError(
                    f"stage {name}: no artifact before it has a score of {domain}, so its teacher "
                    f"cannot be chosen: see the errors in scores.json, or set "
                    f"--teachers.pinned {domain} STAGE"
                )
            best = max(candidates)[-1]
        found[domain] = Teacher(
            best, graph.artifact_dir(best), by_stage.get(best), pinned=pin is not None
        )
    return found


def _digest(folder: str) -> str:
    """Digest of an external artifact; "" for no folder. Raises CheckpointError if it is damaged."""
    return read_artifact(Path(folder)).digest if folder else ""
