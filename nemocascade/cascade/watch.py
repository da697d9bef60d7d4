"""Follows a run from another terminal: its stages as text, and a report that is kept up to date."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nemocascade.cascade.records import CASCADE, SCORES, STAGE
from nemocascade.cascade.report import words, write_report
from nemocascade.cascade.report.read import read_run
from nemocascade.cascade.report.record import Run, Stage
from nemocascade.recipe.commands import WatchSettings
from nemocascade.runtime.logging import StatusPart, fitted, printable, terminal_width
from nemocascade.runtime.run_lock import NAME as LOCK

_FILES = (CASCADE, SCORES, STAGE, "recipe.json", "metrics.jsonl", LOCK)
# Measures of a line in its order: name, text, rank as in `StatusPart`.
_MEASURES = (
    ("reward", "reward {:.2f}", 3),
    ("loss", "loss {:.3f}", 4),
    ("response_tokens", "{:,.0f} tokens", 5),
    ("truncated", "truncated {:.0%}", 6),
)


def watch(settings: WatchSettings) -> Path:
    """Follow the run until it is finished, or until Ctrl-C; returns the report's page.

    Raises ReportError if the folder holds no run.
    """
    run_dir, seen, shown = Path(settings.run), None, 0
    page = run_dir / "report" / "index.html"
    try:
        while True:
            state = _state(run_dir)
            if state != seen:
                seen, run = state, read_run(run_dir)
                shown = _show(run_dir, run, shown)
                page = write_report(run_dir, with_pictures=run.is_finished)
                if run.is_finished:
                    break
            time.sleep(settings.every_s)
    except KeyboardInterrupt:
        print()
    print(f"report: {page}")
    return page


def _state(run_dir: Path) -> list[tuple[str, int, int]]:
    """Times and sizes of the files that a report is made from. The lock's time is its heartbeat."""
    found = []
    for folder in (run_dir, *sorted((run_dir / "stages").glob("*"))):
        for name in _FILES:
            try:
                status = (folder / name).stat()
            except OSError:
                continue
            time_ns = 0 if name == LOCK else status.st_mtime_ns
            found.append((f"{folder}/{name}", time_ns, status.st_size))
    return found


def _show(run_dir: Path, run: Run, shown: int) -> int:
    """Print the run's lines, over the `shown` lines of the last time; returns their number."""
    width = terminal_width()
    lines = status_lines(run, width=width)
    if not run.is_finished and not (run_dir / LOCK).exists():
        note = "no job owns this run now: start it again to resume it"
        lines.append(fitted([StatusPart(note, 0)], width))
    if sys.stdout.isatty() and shown:
        sys.stdout.write(f"\x1b[{shown}A\x1b[J")
    print(printable("\n".join(lines)), flush=True)
    return len(lines)


def status_lines(run: Run, *, width: int) -> list[str]:
    """A line for the run and one for each stage, of at most `width` characters."""
    done = sum(stage.status == "done" for stage in run.stages)
    seconds = sum(stage.seconds or 0.0 for stage in run.stages)
    head = f"{run.name}: {done} of {len(run.stages)} stages done, {words.duration(seconds)}"
    longest = max((len(stage.name) for stage in run.stages), default=0)
    lines = [fitted([StatusPart(head, 0)], width)]
    for stage in run.stages:
        parts = [StatusPart(f"  {stage.name:<{longest}}", 0), StatusPart(f"{stage.status:<7}", 1)]
        lines.append(fitted([*parts, *_parts(run, stage)], width))
    return lines


def _parts(run: Run, stage: Stage) -> Iterator[StatusPart]:
    steps = max((curve[-1][0] for curve in stage.curves.values() if curve), default=0)
    if steps:
        yield StatusPart(f"step {steps}/{stage.recipe.get('steps', '?')}", 2)
    yield StatusPart("stale" if stage.stale else "", 3)
    for name, text, rank in _MEASURES:
        curve = stage.curves.get(name)
        if curve and not (name == "loss" and "reward" in stage.curves):
            yield StatusPart(text.format(curve[-1][1]), rank)
    for domain in stage.domains if stage.kind != "sft" else ():
        if (score := stage.scores.get(domain)) is not None and score.score is not None:
            shown = words.score(score.score, points=run.in_points(domain))
            yield StatusPart(f"{words.label(domain)} {shown}", 7)
    if stage.seconds:
        yield StatusPart(words.duration(stage.seconds), 4)
