"""Figures of held-out scores, time and tokens over the stages of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nemocascade.cascade.report import figures, words
from nemocascade.cascade.report.figures import ACCENT, ALARM, BAND, INK, MUTED, PAPER
from nemocascade.cascade.report.record import Run, Stage
from nemocascade.stages.domain_score import DomainScore

NOISE = 2.0
"""Standard errors of a difference up to which it counts as noise: one in 20 is larger by chance."""
HEAT = LinearSegmentedColormap.from_list("heat", [PAPER, "#6aaad5"])


def standard_error(score: DomainScore) -> float | None:
    """Standard error of a score over its tasks. If it was not measured, its upper bound for rewards
    in 0..1: sqrt(p (1 - p) / n)."""
    if score.standard_error is not None:
        return score.standard_error
    counted = _counted(score)
    if score.score is None or not 0 <= score.score <= 1 or counted < 1:
        return None
    return math.sqrt(score.score * (1 - score.score) / counted)


def difference_error(before: DomainScore, after: DomainScore) -> float | None:
    """Standard error of `after - before`, as if their tasks were independent: mostly too large,
    since both answer the same tasks. None if one is unknown."""
    errors = [_error_above_zero(score) for score in (before, after)]
    if errors[0] is None or errors[1] is None:
        return None
    return math.hypot(errors[0], errors[1])


def _error_above_zero(score: DomainScore) -> float | None:
    """The standard error; if all rewards were equal, that of one more success and failure."""
    found, counted = standard_error(score), _counted(score)
    if found or found is None or score.score is None or counted < 1:
        return found
    share = (min(1.0, max(0.0, score.score)) * counted + 1) / (counted + 2)
    return math.sqrt(share * (1 - share) / counted)


def _counted(score: DomainScore) -> int:
    """Number of tasks with a verdict, or less: errors are counted by sample."""
    return score.tasks - score.errors // max(1, score.samples)


def is_noise(before: DomainScore | None, after: DomainScore | None) -> bool:
    """True if two scores differ by at most `NOISE` standard errors of their difference."""
    if before is None or after is None or before.score is None or after.score is None:
        return False
    error = difference_error(before, after)
    return error is not None and abs(after.score - before.score) <= NOISE * error


def ordered(run: Run) -> list[Stage]:
    """Scored stages: the main line in order, then the side branches."""
    return [*run.main_line, *(s for s in run.scored if s.side)]


def trains(stage: Stage, domain: str) -> bool:
    """True if a stage after SFT trains the domain."""
    return stage.kind != "sft" and domain in stage.domains


def scale(run: Run, domain: str) -> tuple[float, float]:
    """Lowest and highest score of a domain's colour scale: 0..1, or the range of its scores."""
    values = [s.scores[domain].score for s in run.scored if domain in s.scores]
    found = [value for value in values if value is not None]
    if run.in_points(domain) or not found:
        return 0.0, 1.0
    low, high = min(found), max(found)
    return low, high if high > low else low + 1.0


def points_range(run: Run) -> tuple[float, float]:
    """Axis limits that all domains in points share, so that their panels can be compared."""
    found = [
        score.score
        for stage in run.scored
        for domain, score in stage.scores.items()
        if run.in_points(domain) and score.score is not None
    ]
    low, high = 10 * math.floor(10 * min(found)), 10 * math.ceil(10 * max(found))
    # A wide range keeps nearly equal scores from looking like large changes.
    high = max(high, low + 20)
    return max(0, low - 5), high + 5


def draw_domain(ax: Axes, run: Run, domain: str) -> None:
    """Draw one domain's score after each stage, with standard errors; columns as in the table.

    Filled: the main line. Hollow: side branches, tied to where they started. Triangles: alarms.
    Bands: stages that train the domain. Dotted: its teacher's score.
    """
    stages = ordered(run)
    unit = 100 if run.in_points(domain) else 1
    place = {stage.name: number + 1 for number, stage in enumerate(stages)}
    alarmed = {a.stage for a in run.alarms if a.domain == domain}
    value = {
        s.name: unit * found.score
        for s in stages
        if (found := s.scores.get(domain)) is not None and found.score is not None
    }
    for stage in stages:
        if trains(stage, domain):
            ax.axvspan(place[stage.name] - 0.4, place[stage.name] + 0.4, color=BAND, lw=0)
    teacher = run.teachers.get(domain)
    if teacher is not None and teacher.score is not None:
        ax.axhline(unit * teacher.score, color=MUTED, ls=":", lw=1.1)
    line = [s for s in run.main_line if s.name in value]
    ax.plot([place[s.name] for s in line], [value[s.name] for s in line], color=ACCENT, zorder=3)
    for stage in (s for s in stages if s.name in value):
        at, height = place[stage.name], value[stage.name]
        error = standard_error(stage.scores[domain])
        if error is not None:
            ax.errorbar(at, height, unit * error, color=ACCENT, lw=0.8, alpha=0.6, zorder=2)
        if stage.side and stage.start in value:
            ends = [place[stage.start], at], [value[stage.start], height]
            ax.plot(*ends, color=ACCENT, ls=(0, (2, 2)), lw=0.9, zorder=2)
        marker, color = ("v", ALARM) if stage.name in alarmed else ("o", ACCENT)
        size = 7 if stage.name in alarmed else 4.5
        face = PAPER if stage.side else color
        ax.plot(at, height, marker, ms=size, color=color, mfc=face, mew=1.1, zorder=4)
    ax.set_xlim(0.5, len(stages) + 0.5)
    ax.margins(y=0.12)
    if run.in_points(domain):
        ax.set_ylim(*points_range(run))
    figures.finish_axes(ax)
    ax.xaxis.set_major_locator(MaxNLocator(min(len(stages), 12), integer=True))
    number = {float(place[s.name]): str(run.number(s.name)) for s in stages}
    ax.xaxis.set_major_formatter(lambda at, _: number.get(float(at), ""))


def scores_png(path: Path, run: Run) -> None:
    """Write the panels of all domains to one PNG file."""
    domains = run.domains
    figure, axes = figures.small_multiples(len(domains), columns=3, header=0.1, footer=0.5)
    for ax, domain in zip(axes, domains, strict=True):
        draw_domain(ax, run, domain)
        ax.set_title(words.label(domain), loc="left", fontsize=9)
    names = [
        f"{run.number(s.name)} {words.label(s.name)}{' (side)' * s.side}" for s in ordered(run)
    ]
    half = -(-len(names) // 2)
    lines = "   ".join(names[:half]) + "\n" + "   ".join(names[half:])
    figure.text(0.01, 0.01, lines, fontsize=8, color=MUTED, va="bottom")
    figures.png(path, figure)


def heat_map_png(path: Path, run: Run) -> None:
    """Write the score of every domain after every stage; frames mark the domains it trains."""
    stages, domains = ordered(run), run.domains
    shares = np.full((len(domains), len(stages)), np.nan)
    figure = Figure(
        figsize=(1.9 + 0.82 * len(stages), 1.3 + 0.38 * len(domains)), layout="constrained"
    )
    ax = figure.add_subplot()
    alarmed = {(a.domain, a.stage) for a in run.alarms}
    for row, domain in enumerate(domains):
        low, high = scale(run, domain)
        for column, stage in enumerate(stages):
            found = stage.scores.get(domain)
            if found is None or found.score is None:
                continue
            shares[row, column] = (found.score - low) / (high - low)
            text = words.score(found.score, points=run.in_points(domain))
            alarm = (domain, stage.name) in alarmed
            color = ALARM if alarm else INK
            bold = "bold" if alarm or trains(stage, domain) else "normal"
            ax.text(column, row, "▼ " * alarm + text, ha="center", va="center", color=color,
                    fontweight=bold)  # fmt: skip
    ax.imshow(np.ma.masked_invalid(shares), cmap=HEAT, vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(len(stages)), [words.label(s.name) for s in stages], rotation=30, ha="left",
                  rotation_mode="anchor")  # fmt: skip
    ax.set_yticks(range(len(domains)), [words.label(d) for d in domains])
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelcolor=INK)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    side = sum(not s.side for s in stages)
    if 0 < side < len(stages):
        ax.axvline(side - 0.5, color=PAPER, lw=6)
    ax.set_xlabel("bold: trained by the stage    ▼: alarm    right of the gap: side branches")
    figures.png(path, figure)


def costs_png(path: Path, run: Run) -> None:
    """Write time and tokens of every stage to a PNG file."""
    stages = [s for s in run.stages if s.seconds or s.tokens]
    figure = Figure(figsize=(8.5, 0.8 + 0.28 * len(stages)), layout="constrained")
    seconds, tokens = [s.seconds or 0 for s in stages], [s.tokens or 0 for s in stages]
    columns: list[tuple[str, list[float], list[str]]] = [
        ("Time", [*seconds], [words.duration(value) for value in seconds]),
        ("Tokens", [*tokens], [words.count(value) for value in tokens]),
    ]
    for column, (title, values, labels) in enumerate(columns):
        ax: Any = figure.add_subplot(1, 2, column + 1)
        bars = ax.barh(range(len(stages)), values, height=0.62, color=ACCENT)
        ax.bar_label(bars, labels, padding=3, color=INK)
        names = [words.label(s.name) for s in stages] if column == 0 else [""] * len(stages)
        ax.set_yticks(range(len(stages)), names, color=INK)
        ax.invert_yaxis()
        ax.margins(x=0.25)
        ax.set_xticks([])
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.set_title(title, loc="left", fontsize=9)
    figures.png(path, figure)
