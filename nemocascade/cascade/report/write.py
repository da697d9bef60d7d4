"""Writes RUN/report: a self-contained index.html, and the figures as PNG files."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes

from nemocascade.cascade.comparison import changed_settings
from nemocascade.cascade.effects import FILE, FOLDER, Effects, read_interference
from nemocascade.cascade.errors import ReportError
from nemocascade.cascade.report import (
    curves,
    effects,
    figures,
    phases,
    scores,
    settings,
    signs,
    versus,
    view,
    words,
)
from nemocascade.cascade.report.read import read_run
from nemocascade.cascade.report.record import Fault, Run
from nemocascade.runtime.files import replace_text

REFRESH_S = 20
"""Seconds after which the page of an unfinished run reloads itself."""
HERE = Path(__file__).resolve().parent


def write_report(run_dir: Path, *, with_pictures: bool = True) -> Path:
    """Write the report of a finished or unfinished run, of a cascade or a stage; returns the HTML
    file. The page of an unfinished run reloads itself.

    A run with an interference matrix gets a second page for it. with_pictures: write the PNG files
    too. The output is deterministic. Raises ReportError if the folder holds no run, or if its
    cascade.json cannot be read.
    """
    run, matrix = read_run(run_dir), None
    found = next((f for f in (FILE, f"{FOLDER}/{FILE}") if (run_dir / f).is_file()), "")
    if found:
        try:
            matrix = Effects(read_interference(run_dir))
        except ReportError:
            run = replace(run, faults=(*run.faults, Fault(found, "damaged, skipped")))
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    page = _environment().get_template("page.html.jinja")
    with matplotlib.rc_context(figures.SETTINGS):
        text = page.render(
            run=run,
            view=view,
            stages=[(stage, curves.panels(run, stage)) for stage in run.stages],
            draw_domain=lambda domain: partial(scores.draw_domain, run=run, domain=domain),
            ordered=scores.ordered(run),
            pictures=_write_pngs(folder, run) if with_pictures else [],
            refresh=0 if run.is_finished else REFRESH_S,
            matrix=matrix,
            signs=signs,
            settings=settings,
            phases=phases,
            recipes=[(words.words(s.name), s.recipe) for s in run.stages],
            css=_css(),
        )
        _write_matrix(folder, matrix)
    return replace_page(folder / "index.html", text)


def _write_matrix(folder: Path, matrix: Effects | None) -> None:
    """Write the page of the interference matrix and its figure, or delete an earlier one."""
    target = folder / "interference.html"
    if matrix is None:
        target.unlink(missing_ok=True)
        return
    page = _environment().get_template("interference.html.jinja")
    replace_page(target, page.render(effects=matrix, text=effects, css=_css()))
    effects.effects_png(folder / "interference.png", matrix)


def _css() -> Markup:
    return Markup((HERE / "page.css").read_text(encoding="utf-8"))


def write_comparison(run_dir: Path, other: Path) -> Path:
    """Write a page with two runs side by side, RUN/report/versus_NAME_ID.html; returns it.

    Raises ReportError if a folder holds no run, and RecipeError if its settings cannot be read.
    """
    first, second = read_run(run_dir), read_run(other)
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    page = _environment().get_template("versus.html.jinja")
    with matplotlib.rc_context(figures.SETTINGS):
        text = page.render(
            first=first,
            second=second,
            paths=[str(path.resolve()) for path in (run_dir, other)],
            pairs=versus.last_scores(first, second),
            by_stage=versus.stage_scores(first, second),
            costs=versus.cost_pairs(first, second),
            shares=versus.phase_pairs(first, second),
            both=versus.both_panels(first, second),
            changes=changed_settings(run_dir, other),
            phases=phases,
            css=_css(),
        )
    return replace_page(folder / comparison_name(second.name, other), text)


def comparison_name(name: str, run_dir: Path) -> str:
    """File name of the page that compares with a run: several runs may have one name, so an id of
    the run's path is added to it."""
    path_id = hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()[:8]
    return f"versus_{re.sub('[^A-Za-z0-9_-]', '_', name)}_{path_id}.html"


def replace_page(target: Path, text: str) -> Path:
    """Replace a page atomically: a browser may be reading it, and `watch` writing it too."""
    replace_text(target, text)
    return target


def _picture(draw: Callable[[Axes], None], description: str) -> Markup:
    return Markup(figures.svg(draw, description))


@lru_cache(maxsize=2048)
def panel_picture(panel: figures.Panel, description: str) -> Markup:
    """The picture of a panel; `watch` draws only those that have changed."""
    return _picture(partial(figures.draw_panel, panel=panel), description)


def _write_pngs(folder: Path, run: Run) -> list[str]:
    """Write the figures and return their names; figures of an earlier report are deleted."""
    for path in folder.glob("*.png"):
        path.unlink(missing_ok=True)
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
    environment.globals |= {"swatch": _swatch, "picture": _picture, "panel_picture": panel_picture}
    return environment


def _swatch(style: int) -> Markup:
    """Legend swatch: a short line in the style of series `style`."""
    _, dash = figures.style_of(style)
    dashes = "" if dash == "-" else ",".join(f"{2 * n:g}" for n in dash[1])
    line = f'<line x1="1" y1="5" x2="21" y2="5" stroke-dasharray="{dashes}"/>'
    color = f"stroke:var(--s{style % len(figures.SERIES)})"
    return Markup(f'<svg class="swatch" viewBox="0 0 22 10" style="{color}">{line}</svg>')
