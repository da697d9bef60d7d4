"""Text report of a run folder: the tree of its artifacts and the table of their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemocascade.cascade.errors import ReportError
from nemocascade.cascade.records import CASCADE, SCORES, read_cascade
from nemocascade.megatron.artifact import read_artifact
from nemocascade.megatron.checkpoint import CheckpointError
from nemocascade.recipe.cascade import STAGE_NAME
from nemocascade.stages.scoring import Scores, read_scores
from nemocascade.types import Artifact


def report_text(run_dir: Path) -> str:
    """Artifacts, scores, teachers and alarms of a run, as text.

    Raises ReportError if cascade.json cannot be read, or names a stage that is no folder of the
    run.
    """
    found = read_cascade(run_dir)
    names = [s.get("name") if isinstance(s, dict) else None for s in found["stages"]]
    if wrong := [n for n in names if not (isinstance(n, str) and STAGE_NAME.fullmatch(n))]:
        raise ReportError(
            f"{run_dir / CASCADE} names the stage {wrong[0]!r}, which is no folder of this run: "
            "start the cascade again to mend it"
        )
    parts = [artifact_tree(run_dir, found), score_table(run_dir, found)]
    if found["teachers"]:
        parts.append("teachers:")
    for domain, t in sorted(found["teachers"].items()):
        score = "" if t["score"] is None else f", {100 * t['score']:.1f}"
        pinned = ", pinned" if t["pinned"] else ""
        parts[-1] += f"\n  {domain}: {t['stage'] or t['artifact']}{score}{pinned}"
    alarms = [
        f"  {a['stage']}: {a['domain']} {100 * a['before']:.1f} -> {100 * a['after']:.1f}, "
        f"{a['drop']:.1f} points below {a['from_stage']}"
        for a in found["alarms"]
    ]
    return "\n\n".join([*parts, "\n".join(["alarms:", *(alarms or ["  none"])])])


def artifact_tree(run_dir: Path, cascade: Mapping[str, Any]) -> str:
    """Tree of the artifacts, each below the parent that its manifest names.

    Parents are matched by digest: a stage whose parent has been replaced since is listed apart."""
    stages = {s["name"]: s for s in cascade["stages"]}
    artifacts: dict[str, Artifact] = {}
    lost = []
    for name in stages:
        try:
            artifacts[name] = read_artifact(_folder(run_dir, name) / "artifact")
        except CheckpointError:
            lost.append(f"{name}: {stages[name]['status']}, without an artifact")
    by_digest = {a.digest: name for name, a in artifacts.items()}
    below: dict[str, list[str]] = {}
    for name, artifact in artifacts.items():
        parent = by_digest.get(artifact.parent_digest or "", "")
        below.setdefault(parent, []).append(name)
    lines: list[str] = []
    for name in below.get("", []):
        origin = artifacts[name].parent_digest
        if origin:
            lines.append(f"({artifacts[name].parent}, {origin[:12]}, lies elsewhere)")
        lines += _branch(name, below, artifacts, stages)
    return "\n".join([*lines, *lost])


def _branch(
    name: str,
    below: Mapping[str, Sequence[str]],
    artifacts: Mapping[str, Artifact],
    stages: Mapping[str, Any],
) -> list[str]:
    artifact = artifacts[name]
    side = ", side branch" if stages[name]["side"] else ""
    lines = [f"{name}  {artifact.digest[:12]}  {artifact.step} steps{side}"]
    children = below.get(name, [])
    for child in children:
        last = child == children[-1]
        inner = _branch(child, below, artifacts, stages)
        lines += [("└─ " if last else "├─ ") + inner[0]]
        lines += [("   " if last else "│  ") + line for line in inner[1:]]
    return lines


def score_table(run_dir: Path, cascade: Mapping[str, Any]) -> str:
    """Held-out scores in hundredths: stages in rows, domains in columns, * marks the teacher."""
    rows: dict[str, Scores] = {}
    for stage in cascade["stages"]:
        scores = read_scores(_folder(run_dir, stage["name"]) / SCORES)
        if scores is not None and scores.digest == stage["artifact_digest"]:
            rows[stage["name"]] = scores
    domains = sorted({domain for scores in rows.values() for domain in scores.scores})
    if not rows:
        return "no stage has scores yet"
    teachers = {(t["stage"], domain) for domain, t in cascade["teachers"].items()}
    table = [["stage", *domains]]
    for name, scores in rows.items():
        cells = [_cell(scores.of(d), taught=(name, d) in teachers) for d in domains]
        table.append([name, *cells])
    first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = [
        "  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(cells, others, strict=True))])
        for name, *cells in table
    ]
    note = ["* teaches the domain in MOPD"] if teachers else []
    return "\n".join([*lines, *note])


def _cell(score: float | None, *, taught: bool) -> str:
    text = "-" if score is None else f"{100 * score:.1f}"
    return f"{text}*" if taught else text


def _folder(run_dir: Path, name: str) -> Path:
    return run_dir / "stages" / name
