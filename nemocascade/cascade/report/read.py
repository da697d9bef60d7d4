"""Reads a run folder as far as possible. Unreadable parts are counted, never guessed."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

from nemocascade.cascade.records import (
    CASCADE,
    SCORES,
    Alarm,
    ListedStage,
    Teacher,
    read_cascade,
)
from nemocascade.cascade.report.record import Curve, Fault, Run, Sample, Stage
from nemocascade.cascade.staleness import stale_stages
from nemocascade.recipe.paths import is_file_name
from nemocascade.runtime.jsonl import read_undamaged
from nemocascade.stages.domain_score import DomainScore

LONGEST_TEXT = 4_000
"""Most characters of a prompt's turn or of a response; longer texts are cut in the middle."""
SAMPLES = 8
"""Most samples read for each domain of a stage."""
ROLLOUTS = 2
"""Most rollouts read for each logged step."""
EMPTY: dict[Any, float | None] = {int: 0, float: 0.0, int | None: None, float | None: None}
"""Values for missing numbers, by the type of their field."""


class Faults:
    """Counts unreadable entries by file and reason."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, path: Path, what: str) -> None:
        self.counts[(str(path.relative_to(self.root)), what)] += 1

    def listed(self) -> tuple[Fault, ...]:
        return tuple(Fault(file, what, n) for (file, what), n in sorted(self.counts.items()))


def read_run(run_dir: Path) -> Run:
    """Read the run of a folder, of a cascade or of a single stage. Raises ReportError if its
    cascade.json cannot be read, or if it is neither."""
    root = run_dir.resolve()
    faults = Faults(root)
    if not (root / CASCADE).exists() and (root / "recipe.json").is_file():
        return _run_of_stage(root, faults)
    path, found = root / CASCADE, read_cascade(root)
    stages = list(_mappings(found.get("stages"), path, "a stage", faults))
    alarms = _mappings(found.get("alarms"), path, "an alarm", faults)
    listed = [_made(ListedStage, entry) for entry in stages]
    stale = stale_stages(root, [stage for stage in listed if is_file_name(stage.name)])
    return Run(
        name=root.name,
        stages=tuple([_listed_stage(root, entry, stale, faults) for entry in stages]),
        teachers=_made_by_name(Teacher, _mapping(found.get("teachers"))),
        alarms=tuple(
            _made(Alarm, entry)
            for entry in alarms
            if None not in (_number(entry.get("before")), _number(entry.get("after")))
        ),
        # The resolved settings of the stages are read from their own folders.
        settings={k: v for k, v in _mapping(found.get("settings")).items() if k != "stages"},
        versions=_mapping(found.get("versions")),
        faults=faults.listed(),
    )


def _run_of_stage(root: Path, faults: Faults) -> Run:
    """The run of a stage outside of a cascade."""
    recipe = _document(root / "recipe.json", faults, wanted=True)
    kind = next((kind for kind in ("mopd", "grpo") if kind in recipe), "sft")
    status = "done" if (root / "artifact" / "manifest.json").is_file() else "running"
    stage = _made(Stage, {"name": root.name, "kind": kind, "status": status})
    stages = (_stage(root, stage, faults),)
    return Run(root.name, stages, {}, (), {}, {}, faults.listed())


def _listed_stage(
    root: Path, entry: Mapping[str, Any], stale: Mapping[str, str], faults: Faults
) -> Stage:
    """A stage of cascade.json, with the content of its folder."""
    stage = _made(Stage, entry, digest=str(entry.get("artifact_digest") or ""))
    folder = root / "stages" / stage.name
    if not is_file_name(stage.name) or not folder.is_dir():
        if stage.status == "done":
            name = stage.name
            faults.add(root / "stages", f"the folder of the finished stage {name!r} is missing")
        return stage
    return _stage(folder, replace(stage, stale=stale.get(stage.name, "")), faults)


def _stage(folder: Path, stage: Stage, faults: Faults) -> Stage:
    """The stage with what its folder holds."""
    done = stage.status == "done"
    recipe = _document(folder / "recipe.json", faults, wanted=stage.status != "pending")
    curves = _metrics(folder / "metrics.jsonl", faults, wanted=done)
    scores = _document(folder / SCORES, faults, wanted=done)
    trained = recipe.get("domains") or _mapping(recipe.get("demonstrations")).get("domains") or ()
    if scores and stage.digest and scores.get("digest") not in (None, stage.digest):
        faults.add(folder / SCORES, "the scores are of another artifact than the stage's")

    def total(metric: str) -> int:
        """Total of a running stage, summed over its steps: its record has none yet."""
        return int(sum(value for _, value in curves.get(metric, ())))

    return replace(
        stage,
        seconds=stage.seconds or total("step_time_s") or stage.seconds,
        tokens=stage.tokens or total("tokens") or stage.tokens,
        recipe=recipe,
        domains=tuple(
            str(d["domain"])
            for d in (trained if isinstance(trained, list) else [])
            if "domain" in _mapping(d)
        ),
        curves=curves,
        scores={
            str(domain): _score(entry)
            for domain, entry in _mapping(scores.get("scores")).items()
            if isinstance(entry, Mapping)
        },
        samples=[
            _sample(entry, str(domain))
            for domain, entries in _mapping(scores.get("samples")).items()
            for entry in list(_mappings(entries, folder / SCORES, "a sample", faults))[:SAMPLES]
        ],
        scoring_s=_number(scores.get("seconds")) or 0.0,
        rollouts=_rollouts(folder / "rollouts", faults),
    )


def _score(entry: Mapping[str, Any]) -> DomainScore:
    passes = {str(n): _number(value) for n, value in _mapping(entry.get("pass_at")).items()}
    return _made(
        DomainScore, entry, pass_at={n: value for n, value in passes.items() if value is not None}
    )


def _rollouts(folder: Path, faults: Faults) -> list[Sample]:
    """Rollouts of the first and the last step that logged any."""
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
    return _made(
        Sample,
        entry,
        domain=domain,
        task=hashlib.sha256(json.dumps([domain, prompt]).encode()).hexdigest(),
        prompt=tuple((role, shortened(content)) for role, content in prompt),
        response=shortened(str(entry.get("response", ""))),
        error=None if entry.get("error") is None else str(entry["error"]),
    )


def shortened(text: str, longest: int = LONGEST_TEXT) -> str:
    """`text`, cut in the middle if it is longer than `longest`."""
    if len(text) <= longest:
        return text
    tail = longest // 4
    omitted = len(text) - longest
    return f"{text[: longest - tail]}\n[… {omitted:,} characters omitted …]\n{text[-tail:]}"


def _metrics(path: Path, faults: Faults, *, wanted: bool) -> dict[str, Curve]:
    """Curves by name. If a step occurs twice, the later line counts."""
    if not path.is_file():
        if wanted:
            faults.add(path, "missing")
        return {}
    by_step: dict[int, dict[str, Any]] = {}
    for row in _lines(path, faults):
        step = _number(row.get("step"))
        if step is None:
            faults.add(path, "lines without a step, skipped")
            continue
        if int(step) in by_step:
            faults.add(path, "steps with two lines: the later one counts")
        by_step[int(step)] = row
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, row in sorted(by_step.items()):
        for name, value in row.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if (number := _number(value)) is not None:
                curves.setdefault(name, []).append((step, number))
            else:
                faults.add(path, f"values of {name} that are not finite, skipped")
    return dict(curves)


def _lines(path: Path, faults: Faults) -> Iterator[dict[str, Any]]:
    """JSON objects of a JSON Lines file; other lines are counted as faults."""
    lines = read_undamaged(path, lambda _: faults.add(path, "damaged lines, skipped"))
    return (row for _, row in lines)


def _document(path: Path, faults: Faults, *, wanted: bool) -> dict[str, Any]:
    """JSON object of a file; {} if there is none."""
    if not path.is_file():
        if wanted:
            faults.add(path, "missing")
        return {}
    try:
        found = json.loads(path.read_bytes().decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        faults.add(path, "damaged, skipped")
        return {}
    return found


def _mappings(found: Any, path: Path, what: str, faults: Faults) -> Iterator[Mapping[str, Any]]:
    for entry in found if isinstance(found, list) else []:
        if isinstance(entry, Mapping):
            yield entry
        else:
            faults.add(path, f"{what} that is not an object, skipped")


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


def _made[T](kind: type[T], entry: Mapping[str, Any], **known: Any) -> T:
    """A record of an entry's texts, flags and numbers; missing or invalid ones become empty."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if hint in (str, bool):
            found[name] = hint(entry.get(name) or hint())
        elif hint in EMPTY:
            number = _number(entry.get(name))
            if number is not None and hint in (int, int | None):
                number = int(number)
            found[name] = EMPTY[hint] if number is None else number
    return kind(**found | known)


def _made_by_name[T](kind: type[T], entries: Mapping[str, Any]) -> dict[str, T]:
    found = {name: entry for name, entry in entries.items() if isinstance(entry, Mapping)}
    return {str(name): _made(kind, entry) for name, entry in found.items()}


def _number(found: Any) -> float | None:
    """`found` if it is a finite number, else None."""
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    try:
        number = float(found)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
