"""Writes RUN/report: a self-contained index.html, and the figures as PNG files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes

from nemocascade.cascade.report import curves, figures, scores, view, words
from nemocascade.cascade.report.read import read_run
from nemocascade.cascade.report.record import Run
from nemocascade.runtime.files import write_text

HERE = Path(__file__).resolve().parent


def write_report(run_dir: Path) -> Path:
    """Write the report of a finished or unfinished cascade run; returns the HTML file.

    The output is deterministic. Raises ReportError if cascade.json cannot be read.
    """
    run = read_run(run_dir)
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    page = _environment().get_template("page.html.jinja")
    with matplotlib.rc_context(figures.SETTINGS):
        text = page.render(
            run=run,
            view=view,
            stages=[(stage, curves.panels(run, stage)) for stage in run.stages],
            draw_panel=lambda panel: partial(figures.draw_panel, panel=panel),
            draw_domain=lambda domain: partial(scores.draw_domain, run=run, domain=domain),
            ordered=scores.ordered(run),
            pictures=_write_pngs(folder, run),
            recipes=[(words.words(s.name), s.recipe) for s in run.stages],
            css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        )
    target = folder / "index.html"
    unfinished = folder / "index.html.partial"
    write_text(unfinished, text)
    os.replace(unfinished, target)
    return target


def _picture(draw: Callable[[Axes], None], description: str) -> Markup:
    return Markup(figures.svg(draw, description))


def _write_pngs(folder: Path, run: Run) -> list[str]:
    """Write the figures and return their names; figures of an earlier report are deleted."""
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
    environment.filters |= {"words": words.words, "duration": words.duration, "tick": words.tick}
    environment.globals |= {"swatch": _swatch, "picture": _picture}
    return environment


def _swatch(style: int) -> Markup:
    """Legend swatch: a short line in the style of series `style`."""
    _, dash = figures.style_of(style)
    dashes = "" if dash == "-" else ",".join(f"{2 * n:g}" for n in dash[1])
    line = f'<line x1="1" y1="5" x2="21" y2="5" stroke-dasharray="{dashes}"/>'
    color = f"stroke:var(--s{style % len(figures.SERIES)})"
    return Markup(f'<svg class="swatch" viewBox="0 0 22 10" style="{color}">{line}</svg>')
