"""Files of a cascade: a record in each stage's folder, and cascade.json, built from them.

    RUN/cascade.json                stages, teachers, alarms, settings, versions
    RUN/stages/NAME/stage.json      inputs and status of the stage
    RUN/stages/NAME/scores.json     held-out scores of its artifact
    RUN/retired/NAME.1/             a stage's folder whose inputs have changed since

Each file is replaced atomically: a kill leaves either the old content or the new.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from nemocascade.cascade.errors import ReportError
from nemocascade.cascade.graph import StageGraph
from nemocascade.megatron.checkpoint.folder import flush, write_durably
from nemocascade.recipe import CascadeRecipe
from nemocascade.runtime.jsonl import json_text
from nemocascade.runtime.stored_records import record_of
from nemocascade.stages.scoring import Scores, read_scores, read_versioned

VERSION = 1
STAGE = "stage.json"
SCORES = "scores.json"
CASCADE = "cascade.json"
RETIRED = "retired"

Status = Literal["done", "running", "pending"]


@dataclass(frozen=True)
class Teacher:
    """The teacher of a domain. stage: empty for an external artifact. score: its held-out score
    when it was chosen, None without one. pinned: set by the recipe, not chosen by score."""

    stage: str
    artifact: str
    score: float | None
    pinned: bool


@dataclass(frozen=True)
class StageRecord:
    """Inputs and status of a stage.

    key: content key of `inputs`. artifact_digest: empty until the stage is done. seconds: time
    spent on the artifact, without work lost to a kill. tokens: total of the steps in metrics.jsonl.
    """

    key: str
    inputs: dict[str, Any]
    status: Status
    artifact_digest: str = ""
    seconds: float = 0.0
    tokens: int = 0
    teachers: dict[str, Teacher] = field(default_factory=dict)


@dataclass(frozen=True)
class ListedStage:
    """A stage in cascade.json; see `StageConfig` and `StageRecord`. run_dir: its folder, below that
    of the cascade."""

    name: str
    kind: str
    start: str
    side: bool
    status: str
    run_dir: str
    artifact_digest: str = ""
    seconds: float = 0.0
    tokens: int = 0
    key: str = ""


@dataclass(frozen=True)
class Alarm:
    """A drop of a domain's score in a stage. before, after: held-out scores of the stage's start
    artifact and of its own. drop: their difference in points, hundredths."""

    domain: str
    stage: str
    from_stage: str
    before: float
    after: float
    drop: float

    def text(self) -> str:
        """Readable sentence."""
        return (
            f"{self.stage} has lost {self.drop:.1f} points of {self.domain}: "
            f"{100 * self.before:.1f} after {self.from_stage}, {100 * self.after:.1f} now"
        )


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write_durably(partial, (json_text(value, indent=1) + "\n").encode())
    partial.replace(path)
    flush(path.parent)


def write_record(folder: Path, record: StageRecord) -> None:
    """Write a stage's record to its folder."""
    write_json(folder / STAGE, {"version": VERSION, **asdict(record)})


def read_record(folder: Path) -> StageRecord | None:
    """The record in a stage's folder; None if it is missing, damaged or of another version."""
    found = read_versioned(folder / STAGE, VERSION)
    try:
        return None if found is None else record_of(StageRecord, found)
    except ValueError:
        return None


def retire(run_dir: Path, name: str) -> Path:
    """Move a stage's folder to RUN/retired; returns its new path."""
    shelf = run_dir / RETIRED
    shelf.mkdir(parents=True, exist_ok=True)
    number = 1
    while (shelf / f"{name}.{number}").exists():
        number += 1
    target = shelf / f"{name}.{number}"
    (run_dir / "stages" / name).rename(target)
    return target


def done_scores(recipe: CascadeRecipe) -> dict[str, Scores]:
    """Scores of the current artifacts of all finished stages, in execution order."""
    graph = StageGraph(recipe)
    found = {}
    for name in graph.names:
        folder = Path(graph.stage_dir(name))
        record, scores = read_record(folder), read_scores(folder / SCORES)
        if record is None or scores is None or record.status != "done":
            continue
        if scores.digest == record.artifact_digest:
            found[name] = scores
    return found


def find_alarms(recipe: CascadeRecipe, scores: Mapping[str, Scores]) -> list[Alarm]:
    """An alarm for each domain that a stage lowered by more than `alarm.drop` points."""
    found = []
    for name, after in scores.items():
        start = StageGraph(recipe).start_of(name)
        if start not in scores or scores[start].settings != after.settings:
            continue
        for domain in after.scores:
            a, b = scores[start].of(domain), after.of(domain)
            if a is not None and b is not None and 100 * (a - b) > recipe.alarm.drop:
                found.append(Alarm(domain, name, start, a, b, 100 * (a - b)))
    return found


def write_cascade(recipe: CascadeRecipe) -> list[Alarm]:
    """Write RUN/cascade.json from the stages' folders; returns the alarms."""
    graph = StageGraph(recipe)
    stages = []
    teachers: dict[str, Any] = {}
    for stage in recipe.stages:
        folder = Path(graph.stage_dir(stage.name))
        record = read_record(folder) or StageRecord("", {}, "pending")
        stages.append(
            ListedStage(
                name=stage.name,
                kind=stage.kind,
                start=graph.start_of(stage.name),
                side=stage.side,
                status=record.status,
                run_dir=f"stages/{stage.name}",
                artifact_digest=record.artifact_digest,
                seconds=record.seconds,
                tokens=record.tokens,
                key=record.key,
            )
        )
        teachers |= {domain: asdict(t) for domain, t in record.teachers.items()}
    alarms = find_alarms(recipe, done_scores(recipe))
    value = {
        "version": VERSION,
        "stages": [asdict(stage) for stage in stages],
        "teachers": teachers,
        "alarms": [asdict(a) for a in alarms],
        "settings": asdict(recipe),
        "versions": versions(),
    }
    write_json(Path(recipe.run_dir) / CASCADE, value)
    return alarms


def read_cascade(run_dir: Path) -> dict[str, Any]:
    """Content of RUN/cascade.json. Raises ReportError if it cannot be read."""
    path = run_dir / CASCADE
    if not path.is_file():
        raise ReportError(f"{path} does not exist: name the run folder of a cascade")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ReportError(
            f"{path} is not JSON ({error}): start the cascade again to fix it"
        ) from None
    known: dict[str, Any] = {"stages": [], "teachers": {}, "alarms": []}
    known |= found if isinstance(found, dict) else {}
    if known.get("version") != VERSION:
        raise ReportError(
            f"{path} has version {known.get('version')!r}, this program reads {VERSION}: use the "
            "program that wrote it"
        )
    return known


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that do the computation."""
    found = {"python": platform.python_version()}
    for package in ("nemocascade", "torch", "megatron-core"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
