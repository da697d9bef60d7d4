"""Writes RUN/report: index.html, which needs no other file, and the figures as PNG files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup

from nemocascade.cascade.report import curves, figures, scores, view, words
from nemocascade.cascade.report.figures import Panel
from nemocascade.cascade.report.read import read_run
from nemocascade.cascade.report.record import Run, Stage

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Drawn:
    """A panel with its picture. ends: the first and the last value, where it has one curve."""

    panel: Panel
    picture: Markup
    ends: tuple[str, str] | None


def write_report(run_dir: Path) -> Path:
    """Write the report of a cascade's run folder, as far as the run has come; returns the HTML
    file.

    The same folder gives the same bytes. Raises ReportError if cascade.json cannot be read.
    """
    run = read_run(run_dir)
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context(figures.SETTINGS):
        stages = [
            (stage, [_drawn(panel, stage) for panel in curves.panels(run, stage)])
            for stage in run.stages
        ]
        domains = [(domain, _domain_picture(run, domain)) for domain in run.domains]
        pictures = _write_pngs(folder, run)
    page = _environment().get_template("page.html.jinja")
    text = page.render(
        run=run,
        view=view,
        stages=stages,
        domains=domains,
        ordered=scores.ordered(run),
        styles=curves.domain_styles(run),
        pictures=pictures,
        recipes=[(words.words(s.name), s.recipe) for s in run.stages],
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
    )
    target = folder / "index.html"
    partial = folder / "index.html.partial"
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)
    return target


def _drawn(panel: Panel, stage: Stage) -> Drawn:
    picture = figures.svg(
        lambda ax: figures.draw_panel(ax, panel), f"{panel.title} over the steps of {stage.name}"
    )
    ends = view.first_and_last(panel.lines[0].curve) if len(panel.lines) == 1 else None
    return Drawn(panel, Markup(picture), ends)


def _domain_picture(run: Run, domain: str) -> Markup:
    return Markup(
        figures.svg(
            lambda ax: scores.draw_domain(ax, run, domain),
            f"Held-out score of {domain} after each stage",
        )
    )


def _write_pngs(folder: Path, run: Run) -> list[str]:
    """Write the figures and return their names; those of an earlier report go."""
    for path in folder.glob("*.png"):
        path.unlink()
    written = []

    def write(name: str, draw: Any, *arguments: Any) -> None:
        draw(folder / name, *arguments)
        written.append(name)

    if run.domains:
        write("scores_heat_map.png", scores.heat_map_png, run)
        write("scores.png", scores.scores_png, run)
    if any(s.seconds or s.tokens for s in run.stages):
        write("time_and_tokens.png", scores.costs_png, run)
    for number, stage in enumerate(run.stages):
        if found := curves.panels(run, stage):
            name = re.sub(r"[^A-Za-z0-9_-]", "_", stage.name)
            title = words.words(stage.name)
            write(f"stage_{number + 1:02d}_{name}.png", figures.grid_png, found, title)
    return written


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "words": words.words,
        "duration": words.duration,
        "tick": words.tick,
    }
    environment.globals["swatch"] = _swatch
    return environment


def _swatch(style: int) -> Markup:
    """A piece of the line of series `style`, for legends."""
    _, dash = figures.style_of(style)
    dashes = "" if dash == "-" else ",".join(f"{2 * n:g}" for n in dash[1])
    line = f'<line x1="1" y1="5" x2="21" y2="5" stroke-dasharray="{dashes}"/>'
    color = f"stroke:var(--s{style % len(figures.SERIES)})"
    return Markup(f'<svg class="swatch" viewBox="0 0 22 10" style="{color}">{line}</svg>')
