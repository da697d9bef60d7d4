"""Finished stages whose start or teachers have been made again since, as after `--only`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nemocascade.cascade.records import ListedStage, StageRecord, read_record


def stale_stages(run_dir: Path, stages: Iterable[ListedStage]) -> dict[str, str]:
    """The reason by stage, in their order: an artifact that it was made from is another one now, or
    is stale itself. Stages that are not done are never stale."""
    records = {s.name: read_record(run_dir / "stages" / s.name) for s in stages}
    stale: dict[str, str] = {}
    for stage in stages:
        record = records[stage.name]
        if record is None or record.status != "done":
            continue
        changed, follows = [], []
        for source, digest in _sources(stage, record):
            now = records.get(source)
            if now is None or now.artifact_digest != digest:
                changed.append(source)
            elif source in stale:
                follows.append(source)
        if changed:
            stale[stage.name] = f"made from an earlier {_listed(changed)}"
        elif follows:
            stale[stage.name] = f"made from {_listed(follows)}, which is stale"
    return stale


def _sources(stage: ListedStage, record: StageRecord) -> list[tuple[str, str]]:
    """The stages that a stage was made from, each with the digest of the artifact that it used."""
    taught = record.inputs.get("teachers")
    digests = taught if isinstance(taught, dict) else {}
    found = [(t.stage, str(digests.get(domain))) for domain, t in record.teachers.items()]
    start = [(stage.start, str(record.inputs.get("start") or ""))] if stage.start else []
    return [*start, *(pair for pair in found if pair[0])]


def _listed(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))
