"""Text report of a run folder: the tree of its artifacts and the table of their scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemocascade.cascade.errors import ReportError
from nemocascade.cascade.records import (
    CASCADE,
    SCORES,
    Alarm,
    ListedStage,
    Teacher,
    read_cascade,
)
from nemocascade.cascade.staleness import stale_stages
from nemocascade.megatron.artifact import read_artifact
from nemocascade.megatron.checkpoint import CheckpointError
from nemocascade.recipe.cascade import STAGE_NAME
from nemocascade.runtime.stored_records import record_of
from nemocascade.stages.domain_score import DomainScore
from nemocascade.stages.scoring import Scores, read_scores
from nemocascade.types import Artifact


@dataclass(frozen=True)
class CascadeListing:
    """Contents of cascade.json. teachers: by domain."""

    stages: list[ListedStage]
    teachers: dict[str, Teacher]
    alarms: list[Alarm]


def listed_in(run_dir: Path) -> CascadeListing:
    """Read a run's cascade.json.

    Raises ReportError if it cannot be read, is damaged, or names a stage that is not a folder of
    the run.
    """
    found = read_cascade(run_dir)
    try:
        run = record_of(
            CascadeListing, {name: found[name] for name in ("stages", "teachers", "alarms")}
        )
    except ValueError as error:
        raise ReportError(
            f"{run_dir / CASCADE} is damaged ({error}): start the cascade again to fix it"
        ) from None
    if wrong := [s.name for s in run.stages if not STAGE_NAME.fullmatch(s.name)]:
        raise ReportError(
            f"{run_dir / CASCADE} names the stage {wrong[0]!r}, which is not a folder of this run: "
            "start the cascade again to fix it"
        )
    return run


def report_text(run_dir: Path) -> str:
    """Artifacts, scores, teachers and alarms of a run, as text. Raises as `listed_in`."""
    run = listed_in(run_dir)
    parts = [artifact_tree(run_dir, run), score_table(run_dir, run)]
    if run.teachers:
        parts.append("teachers:")
    for domain, t in sorted(run.teachers.items()):
        score = "" if t.score is None else f", {100 * t.score:.1f}"
        pinned = ", pinned" if t.pinned else ""
        parts[-1] += f"\n  {domain}: {t.stage or t.artifact}{score}{pinned}"
    alarms = [
        f"  {a.stage}: {a.domain} {100 * a.before:.1f} -> {100 * a.after:.1f}, "
        f"{a.drop:.1f} points below {a.from_stage}"
        for a in run.alarms
    ]
    return "\n\n".join([*parts, "\n".join(["alarms:", *(alarms or ["  none"])])])


def artifact_tree(run_dir: Path, run: CascadeListing) -> str:
    """Tree of the artifacts, each below the parent that its manifest names.

    Parents are matched by digest: a stage whose parent has been replaced since is listed apart."""
    stages = {s.name: s for s in run.stages}
    artifacts: dict[str, Artifact] = {}
    lost = []
    for name in stages:
        try:
            artifacts[name] = read_artifact(_folder(run_dir, name) / "artifact")
        except CheckpointError:
            lost.append(f"{name}: {stages[name].status}, without an artifact")
    by_digest = {a.digest: name for name, a in artifacts.items()}
    below: dict[str, list[str]] = {}
    for name, artifact in artifacts.items():
        parent = by_digest.get(artifact.parent_digest or "", "")
        below.setdefault(parent, []).append(name)
    lines: list[str] = []
    for name in below.get("", []):
        origin = artifacts[name].parent_digest
        if origin:
            lines.append(f"({artifacts[name].parent}, {origin[:12]}, in another place)")
        lines += _branch(name, below, artifacts, stages)
    return "\n".join([*lines, *lost])


def _branch(
    name: str,
    below: Mapping[str, Sequence[str]],
    artifacts: Mapping[str, Artifact],
    stages: Mapping[str, ListedStage],
) -> list[str]:
    artifact = artifacts[name]
    side = ", side branch" if stages[name].side else ""
    lines = [f"{name}  {artifact.digest[:12]}  {artifact.step} steps{side}"]
    children = below.get(name, [])
    for child in children:
        last = child == children[-1]
        inner = _branch(child, below, artifacts, stages)
        lines += [("└─ " if last else "├─ ") + inner[0]]
        lines += [("   " if last else "│  ") + line for line in inner[1:]]
    return lines


def score_table(run_dir: Path, run: CascadeListing) -> str:
    """Held-out scores in hundredths: stages in rows, in the cascade's order; domains in columns, in
    the order in which stages train them.

    [ ] marks the domains that a stage trains, * the teacher. Scores of several samples have their
    standard error. Stale stages and unreadable scores are named below the table.
    """
    rows: dict[str, Scores] = {}
    unread = []
    for stage in run.stages:
        path = _folder(run_dir, stage.name) / SCORES
        scores = read_scores(path)
        if scores is not None and scores.digest == stage.artifact_digest:
            rows[stage.name] = scores
        elif scores is None and path.exists():
            unread.append(str(path))
    damaged = f"damaged, or of another version: {', '.join(unread)}" if unread else ""
    if not rows:
        return "\n".join(filter(None, ["no stage has scores yet", damaged]))
    trained = {s.name: _trained_domains(run_dir, s) for s in run.stages}
    scored = sorted({domain for scores in rows.values() for domain in scores.scores})
    in_order = (domain for found in trained.values() for domain in found if domain in scored)
    domains = list(dict.fromkeys([*in_order, *scored]))
    teachers = {(t.stage, domain) for domain, t in run.teachers.items()}
    stale = stale_stages(run_dir, run.stages)
    table = []
    for name, scores in rows.items():
        cells = [
            _cell(scores.scores.get(d), trained=d in trained[name], taught=(name, d) in teachers)
            for d in domains
        ]
        table.append([name, *cells, "stale" if name in stale else ""])
    notes = ["[ ] the stage trains this domain"] if any(trained.values()) else []
    notes += ["* teaches the domain in MOPD"] if teachers else []
    parts = ["\n".join(_aligned([*_headings(domains), *table])), "   ".join(notes), damaged]
    if stale:
        lines = [f"  {name} is {reason}" for name, reason in stale.items()]
        parts.append("\n".join(["stale: the next full run makes these again", *lines]))
    return "\n".join(filter(None, parts))


def _headings(domains: Sequence[str]) -> list[list[str]]:
    """The rows above the scores: the words of each name are below each other."""
    words = [domain.split("_") for domain in domains]
    height = max(map(len, words))
    filled = [[*[""] * (height - len(w)), *(f"{word} " for word in w)] for w in words]
    rows = [list(row) for row in zip(*filled, strict=True)]
    return [["stage" if row is rows[-1] else "", *row, ""] for row in rows]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines: names to the left, scores to the right."""
    first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
    return [
        " ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(cells, others, strict=True))])
        .rstrip()
        for name, *cells in table
    ]  # fmt: skip


def _trained_domains(run_dir: Path, stage: ListedStage) -> list[str]:
    """The domains that a stage after SFT trains; [] if its recipe cannot be read."""
    try:
        text = (_folder(run_dir, stage.name) / "recipe.json").read_text(encoding="utf-8")
        return [str(d["domain"]) for d in json.loads(text).get("domains", [])]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []


def _cell(found: DomainScore | None, *, trained: bool, taught: bool) -> str:
    text = "-" if found is None or found.score is None else f"{100 * found.score:.1f}"
    if found is not None and found.samples > 1 and found.standard_error is not None:
        text += f"±{100 * found.standard_error:.1f}"
    text = f"{text}*" if taught else text
    return f"[{text}]" if trained else f"{text} "


def _folder(run_dir: Path, name: str) -> Path:
    return run_dir / "stages" / name
