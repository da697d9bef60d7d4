"""Texts and rows of the page, in display order, without markup."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemocascade.cascade.report import words
from nemocascade.cascade.report.record import Curve, Run, Sample, Stage
from nemocascade.cascade.report.scores import is_noise, ordered, scale, standard_error, trains
from nemocascade.stages.domain_score import DomainScore

Answers = list[tuple[str, Sample]]
"""(stage name, answer) pairs of one task."""
TASKS = 3
"""Most tasks shown for each domain, with the answers of the stages."""
NEAR_TEACHER = 0.02
"""Largest gap below the teacher at which a student has reached it."""


@dataclass(frozen=True)
class Cell:
    """Cell of the score table. error: its standard error. heat: 0..1 on its scale. change: from the
    stage it starts from. noise: the change is within noise."""

    text: str
    error: str
    heat: float
    change: str
    noise: bool
    alarm: bool
    trained: bool
    note: str


def score_rows(run: Run) -> list[tuple[str, list[Cell | None]]]:
    """Domains with their cells, one for each stage of `ordered(run)`."""
    alarmed = {(a.domain, a.stage) for a in run.alarms}
    rows = []
    for domain in run.domains:
        cells = [
            _cell(run, domain, stage, (domain, stage.name) in alarmed) for stage in ordered(run)
        ]
        rows.append((domain, cells))
    return rows


def tasks_of(run: Run, domain: str) -> str:
    """Number of a domain's held-out tasks, and of their samples; a range if stages differ."""
    found = [s.scores[domain] for s in run.scored if domain in s.scores]
    counts = sorted({score.tasks for score in found})
    samples = max(score.samples for score in found)
    tasks = "–".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1])))
    return f"n {tasks}{f' × {samples}' if samples > 1 else ''}"


def mean_row(run: Run) -> list[str]:
    """Mean score of each stage, "" if a domain is missing."""
    return [words.score(mean_score(run, stage), points=True) for stage in ordered(run)]


def _cell(run: Run, domain: str, stage: Stage, alarm: bool) -> Cell | None:
    found = stage.scores.get(domain)
    if found is None:
        return None
    trained = trains(stage, domain)
    if found.score is None:
        return Cell(
            "–", "", 0.0, "", False, alarm, trained, f"no verdict on any of {found.tasks} tasks"
        )
    points = run.in_points(domain)
    low, high = scale(run, domain)
    parent = run.stage(stage.start)
    error = standard_error(found)
    return Cell(
        text=words.score(found.score, points=points),
        error="" if error is None else words.score(error, points=points),
        heat=round((found.score - low) / (high - low), 3),
        change=_change(value_of(parent, domain), found.score, points),
        noise=is_noise(None if parent is None else parent.scores.get(domain), found),
        alarm=alarm,
        trained=trained,
        note=_note(found, points),
    )


def _note(found: DomainScore, points: bool) -> str:
    """Tooltip of a score: number of tasks, verifier errors and standard error."""
    parts = [f"{found.tasks:,} tasks", *([found.passes] if found.passes else [])]
    if found.errors:
        parts.append(f"{found.errors:,} without a verdict, not counted")
    error = standard_error(found)
    if error is not None:
        parts.append(f"standard error {words.score(error, points=points)}")
    return ", ".join(parts)


def value_of(stage: Stage | None, domain: str) -> float | None:
    """Score of a domain after a stage; None if there is none."""
    if stage is None or domain not in stage.scores:
        return None
    return stage.scores[domain].score


def _change(before: float | None, after: float | None, points: bool) -> str:
    gap = None if before is None or after is None else after - before
    return words.score(gap, points=points, signed=True)


def other_scales(run: Run) -> list[str]:
    """Domains whose scores are not in 0..1."""
    return [domain for domain in run.domains if not run.in_points(domain)]


def verifier_errors(run: Run) -> int:
    """Number of held-out answers, over all stages, without a verdict."""
    return sum(score.errors for stage in run.scored for score in stage.scores.values())


def mean_score(run: Run, stage: Stage) -> float | None:
    """Mean over the domains whose scores are in 0..1; None unless the stage has all of them."""
    values = [value_of(stage, domain) for domain in run.domains if run.in_points(domain)]
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found and len(found) == len(values) else None


def headline(run: Run) -> list[tuple[str, str, str]]:
    """The figures at the top: label, value, remark."""
    done = sum(s.status == "done" for s in run.stages)
    tiles = [("Stages done", f"{done} of {len(run.stages)}", "")]
    line = [(s, m) for s in run.main_line if (m := mean_score(run, s)) is not None]
    if line:
        (first, before), (last, after) = line[0], line[-1]
        remark = f"after {words.words(last.name)}"
        if len(line) > 1:
            remark = f"{_change(before, after, True)} since {words.words(first.name)}"
        tiles.append(("Mean score", words.score(after, points=True), remark))
    tiles.append(("Alarms", str(len(run.alarms)), ""))
    seconds = sum(s.seconds or 0 for s in run.stages)
    tokens = sum(s.tokens or 0 for s in run.stages)
    reach = "of all stages" if done == len(run.stages) else "so far"
    if seconds:
        tiles.append(("Time", words.duration(seconds), reach))
    if tokens:
        tiles.append(("Tokens", words.count(tokens), reach))
    return tiles


def alarm_lines(run: Run) -> list[str]:
    """A sentence for each alarm."""
    lines = []
    for alarm in run.alarms:
        points = run.in_points(alarm.domain)
        drop, before, after = (
            words.score(value, points=points)
            for value in (alarm.before - alarm.after, alarm.before, alarm.after)
        )
        since = f" (against {words.words(alarm.from_stage)})" if alarm.from_stage else ""
        lines.append(
            f"{words.words(alarm.domain)} lost {drop}{' points' * points} in "
            f"{words.words(alarm.stage)}{since}: {before} → {after}"
        )
    return lines


def teacher_rows(run: Run) -> list[dict[str, Any]]:
    """Teachers with the student before and after distillation, and at the end of the run."""
    student = next((s for s in run.stages if s.kind == "mopd"), None)
    last = run.main_line[-1] if run.main_line else None
    rows = []
    for domain, teacher in run.teachers.items():
        points = run.in_points(domain)
        start = None if student is None else run.stage(student.start)
        after = value_of(student, domain)
        near = -NEAR_TEACHER * (1 if points else 50)
        rows.append(
            {
                "domain": domain,
                "name": words.words(teacher.stage) or teacher.artifact,
                "pinned": teacher.pinned,
                "score": words.score(teacher.score, points=points),
                "before": words.score(value_of(start, domain), points=points),
                "after": words.score(after, points=points),
                "gap": _change(teacher.score, after, points),
                "reached": after is not None
                and teacher.score is not None
                and after - teacher.score >= near,
                "end": words.score(value_of(last, domain), points=points),
            }
        )
    return rows


def cost_rows(run: Run) -> list[dict[str, Any]]:
    """Stages with their steps, time, tokens and speed."""
    longest = max([s.seconds or 0 for s in run.stages], default=0) or 1
    most = max([s.tokens or 0 for s in run.stages], default=0) or 1
    return [
        {
            "stage": stage,
            "steps": _steps(stage),
            "time": words.duration(stage.seconds) if stage.seconds else "",
            "time_share": 100 * (stage.seconds or 0) / longest,
            "tokens": words.count(stage.tokens) if stage.tokens else "",
            "tokens_share": 100 * (stage.tokens or 0) / most,
            "speed": words.count(stage.tokens / stage.seconds)
            if stage.tokens and stage.seconds
            else "",
        }
        for stage in run.stages
    ]


def _steps(stage: Stage) -> str:
    """Number of steps done, and of how many."""
    done = max((curve[-1][0] for curve in stage.curves.values() if curve), default=0)
    wanted = stage.recipe.get("steps")
    if not done and wanted is None:
        return ""
    return f"{done:,}" if done == wanted or wanted is None else f"{done:,} of {wanted:,}"


def lineage(run: Run) -> list[tuple[int, Stage]]:
    """Stages with their depth: each stage follows the one it starts from, branches indented."""
    names = {s.name for s in run.stages}

    def below(start: str, depth: int) -> Iterator[tuple[int, Stage]]:
        mine = [s for s in run.stages if (s.start if s.start in names else "") == start]
        line = [s for s in mine if not s.side][-1:]
        for stage in [s for s in mine if s not in line] + line:
            inward = depth if stage in line else depth + 1
            yield inward, stage
            yield from below(stage.name, inward)

    return list(below("", 0))


def answered(run: Run) -> list[tuple[str, list[Answers]]]:
    """Held-out tasks of each domain with the answers of the main line's stages, in order; tasks
    whose reward changed come first."""
    found: list[tuple[str, list[Answers]]] = []
    for domain in run.domains:
        answers: dict[str, Answers] = {}
        for stage in run.main_line:
            for sample in stage.samples:
                if sample.domain == domain:
                    answers.setdefault(sample.task, []).append((stage.name, sample))
        both = [given for given in answers.values() if len(given) > 1]
        both.sort(key=lambda given: given[0][1].reward == given[-1][1].reward)
        if both:
            found.append((domain, both[:TASKS]))
    return found


def first_and_last(curve: Curve) -> tuple[str, str]:
    """Means of the first and the last tenth of a curve."""
    part = max(1, len(curve) // 10)
    ends = curve[:part], curve[-part:]
    first, last = (words.number(sum(v for _, v in end) / len(end)) for end in ends)
    return first, last
