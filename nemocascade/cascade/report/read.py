"""Reads a run folder as far as it can be read. What cannot is counted, never guessed."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemocascade.cascade.errors import CascadeError
from nemocascade.cascade.report.record import (
    Alarm,
    Curve,
    Fault,
    Run,
    Sample,
    Score,
    Stage,
    Teacher,
)
from nemocascade.runtime.jsonl import read_undamaged

VERSION = 1
LONGEST_TEXT = 4_000
"""Characters of a prompt's turn or of a response; what is longer loses its middle."""
SAMPLES = 8
"""Of a domain of a stage, at most."""
ROLLOUTS = 2
"""Of a kept step, at most."""


class ReportError(CascadeError):
    """There is no cascade run to report on. The message says what is wrong and what to do."""


class Faults:
    """Counts what could not be read, by file and reason."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, path: Path, what: str, count: int = 1) -> None:
        self.counts[(str(path.relative_to(self.root)), what)] += count

    def listed(self) -> tuple[Fault, ...]:
        return tuple(Fault(file, what, n) for (file, what), n in sorted(self.counts.items()))


def read_run(run_dir: Path) -> Run:
    """The run of a folder. Raises ReportError if its cascade.json cannot be read."""
    root = run_dir.resolve()
    faults = Faults(root)
    found = _cascade(root)
    stages = []
    for entry in _mappings(found.get("stages"), root / "cascade.json", "a stage", faults):
        stages.append(_stage(root, entry, faults))
    teachers = found.get("teachers")
    return Run(
        name=root.name,
        stages=tuple(stages),
        teachers=tuple(
            Teacher(
                domain=str(domain),
                stage=str(entry.get("stage") or ""),
                artifact=str(entry.get("artifact") or ""),
                score=_number(entry.get("score")),
                pinned=bool(entry.get("pinned", False)),
            )
            for domain, entry in (teachers.items() if isinstance(teachers, Mapping) else ())
            if isinstance(entry, Mapping)
        ),
        alarms=tuple(
            _alarms(_mappings(found.get("alarms"), root / "cascade.json", "an alarm", faults))
        ),
        # The stages' own settings are read from their folders, as they were resolved.
        settings={k: v for k, v in _mapping(found.get("settings")).items() if k != "stages"},
        versions=_mapping(found.get("versions")),
        faults=faults.listed(),
    )


def _cascade(root: Path) -> dict[str, Any]:
    path = root / "cascade.json"
    if not path.is_file():
        raise ReportError(f"{path} is not there: name the run folder of a cascade")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(
            f"{path} is no JSON ({error}): start the cascade again to mend it"
        ) from None
    if not isinstance(found, dict) or found.get("version") != VERSION:
        version = found.get("version") if isinstance(found, dict) else None
        raise ReportError(
            f"{path} has version {version!r}, this program reads {VERSION}: use the program that "
            "wrote it"
        )
    return found


def _alarms(entries: Iterator[Mapping[str, Any]]) -> Iterator[Alarm]:
    for entry in entries:
        before, after = _number(entry.get("before")), _number(entry.get("after"))
        if before is not None and after is not None:
            yield Alarm(
                domain=str(entry.get("domain", "")),
                stage=str(entry.get("stage", "")),
                from_stage=str(entry.get("from_stage", "")),
                before=before,
                after=after,
            )


def _stage(root: Path, entry: Mapping[str, Any], faults: Faults) -> Stage:
    name = str(entry.get("name", ""))
    folder = root / "stages" / name
    fields: dict[str, Any] = {
        "name": name,
        "kind": str(entry.get("kind", "")),
        "start": str(entry.get("start") or ""),
        "side": bool(entry.get("side", False)),
        "status": str(entry.get("status", "")),
        "digest": str(entry.get("artifact_digest") or ""),
        "seconds": _number(entry.get("seconds")),
        "tokens": None if (n := _number(entry.get("tokens"))) is None else int(n),
    }
    if Path(name).name != name or name in ("", "..") or not folder.is_dir():
        if fields["status"] == "done":
            faults.add(root / "stages", f"the folder of the finished stage {name!r} is missing")
        return Stage(**fields)
    recipe = _document(folder / "recipe.json", faults, wanted=fields["status"] != "pending")
    curves = _metrics(folder / "metrics.jsonl", faults, wanted=fields["status"] == "done")
    scores = _document(folder / "scores.json", faults, wanted=fields["status"] == "done")
    if scores and fields["digest"] and scores.get("digest") not in (None, fields["digest"]):
        faults.add(folder / "scores.json", "the scores are of another artifact than the stage's")
    # A stage under way has no totals yet: its steps do.
    for total, metric in (("seconds", "step_time_s"), ("tokens", "tokens")):
        if not fields[total] and metric in curves:
            fields[total] = type(fields[total] or 0)(sum(value for _, value in curves[metric]))
    return Stage(
        **fields,
        recipe=recipe,
        domains=_domains(recipe),
        curves=curves,
        scores=_scores(_mapping(scores.get("scores"))),
        samples=_scored_samples(_mapping(scores.get("samples")), folder / "scores.json", faults),
        rollouts=_rollouts(folder / "rollouts", faults),
    )


def _domains(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    found = recipe.get("domains") or _mapping(recipe.get("demonstrations")).get("domains") or ()
    return tuple(str(d["domain"]) for d in found if isinstance(d, Mapping) and "domain" in d)


def _scores(found: Mapping[str, Any]) -> dict[str, Score]:
    return {
        str(domain): Score(
            value=_number(entry.get("score")),
            tasks=int(_number(entry.get("tasks")) or 0),
            errors=int(_number(entry.get("errors")) or 0),
        )
        for domain, entry in found.items()
        if isinstance(entry, Mapping)
    }


def _scored_samples(found: Mapping[str, Any], path: Path, faults: Faults) -> list[Sample]:
    samples = []
    for domain, entries in found.items():
        for entry in list(_mappings(entries, path, "a sample", faults))[:SAMPLES]:
            samples.append(_sample(entry, str(domain)))
    return samples


def _rollouts(folder: Path, faults: Faults) -> list[Sample]:
    """Of the first and the last step that kept some."""
    files = sorted(folder.glob("step_*.jsonl"))
    samples: list[Sample] = []
    for path in dict.fromkeys([*files[:1], *files[-1:]]):
        rows = list(_lines(path, faults))[:ROLLOUTS]
        samples += [_sample(row, str(row.get("domain", ""))) for row in rows]
    return samples


def _sample(entry: Mapping[str, Any], domain: str) -> Sample:
    turns = entry.get("prompt")
    prompt = [
        (str(turn.get("role", "")), str(turn.get("content", "")))
        for turn in (turns if isinstance(turns, list) else [])
        if isinstance(turn, Mapping)
    ]
    step = _number(entry.get("step"))
    return Sample(
        domain=domain,
        task=hashlib.sha256(json.dumps([domain, prompt]).encode()).hexdigest(),
        prompt=tuple((role, shortened(content)) for role, content in prompt),
        response=shortened(str(entry.get("response", ""))),
        reward=_number(entry.get("reward")),
        error=None if entry.get("error") is None else str(entry["error"]),
        step=None if step is None else int(step),
    )


def shortened(text: str, longest: int = LONGEST_TEXT) -> str:
    """`text`, without its middle if it is longer than `longest`."""
    if len(text) <= longest:
        return text
    tail = longest // 4
    left_out = len(text) - longest
    return f"{text[: longest - tail]}\n[… {left_out:,} characters left out …]\n{text[-tail:]}"


def _metrics(path: Path, faults: Faults, *, wanted: bool) -> dict[str, Curve]:
    """Curves by name. Of a step that stands twice the later line counts."""
    if not path.is_file():
        if wanted:
            faults.add(path, "missing")
        return {}
    by_step: dict[int, dict[str, Any]] = {}
    for row in _lines(path, faults):
        step = _number(row.get("step"))
        if step is None:
            faults.add(path, "lines without a step, left out")
            continue
        if int(step) in by_step:
            faults.add(path, "steps that stand twice: the later line counts")
        by_step[int(step)] = row
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, row in sorted(by_step.items()):
        for name, value in row.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                curves.setdefault(name, []).append((step, float(value)))
            else:
                faults.add(path, f"values of {name} that are not finite, left out")
    return dict(curves)


def _lines(path: Path, faults: Faults) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, a line each; other lines are counted."""
    lines = read_undamaged(path, lambda _: faults.add(path, "damaged lines, left out"))
    return (row for _, row in lines)


def _document(path: Path, faults: Faults, *, wanted: bool) -> dict[str, Any]:
    """The JSON object of a file; {} where there is none."""
    if not path.is_file():
        if wanted:
            faults.add(path, "missing")
        return {}
    try:
        found = json.loads(path.read_bytes().decode("utf-8", errors="replace"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        faults.add(path, "damaged, left out")
        return {}
    return found


def _mappings(found: Any, path: Path, what: str, faults: Faults) -> Iterator[Mapping[str, Any]]:
    for entry in found if isinstance(found, list) else []:
        if isinstance(entry, Mapping):
            yield entry
        else:
            faults.add(path, f"{what} that is no object, left out")


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


def _number(found: Any) -> float | None:
    """A finite number, or None for everything else."""
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)
