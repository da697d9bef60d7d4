"""Figures of the report, as SVG in the page's colours and fonts and as PNG files.

SVG text stays text, and colours become CSS variables, so one figure serves the light and the dark
page. `COLORS` maps colours to variables; page.css sets their values for both.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nemocascade.cascade.report import words
from nemocascade.cascade.report.record import Curve

INK, MUTED, GRID, PAPER = "#1b1f24", "#5a6570", "#dfe3e8", "#fefefe"
ACCENT, ALARM, BAND = "#0b63a5", "#c44601", "#eef3f8"
# Okabe and Ito's palette, safe for colour-blind readers, without yellow.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666e78")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.6)), (0, (1.2, 1.4)))
COLORS = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    ACCENT: "--accent",
    ALARM: "--alarm",
    BAND: "--band",
    **{color: f"--s{number}" for number, color in enumerate(SERIES)},
}
POINTS = 300
"""Most points drawn for a curve; longer curves are drawn as means of equal parts."""
SMOOTH_FROM = 40
"""Fewest points of a curve that is drawn with its running mean."""
PANEL = (3.5, 2.0)  # inches
DPI = 120
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nemocascade",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "figure.facecolor": PAPER,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "xtick.major.width": 0.6,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Line:
    """One curve of a panel. style: number of its colour and dashes. dots: drawn as points."""

    label: str
    curve: Curve
    style: int = 0
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """One measure over the steps of a stage. from_zero: the axis includes 0. by_domain: each line
    is a domain, drawn in the domain's style."""

    title: str
    lines: tuple[Line, ...]
    from_zero: bool = False
    by_domain: bool = False


def style_of(number: int) -> tuple[str, Any]:
    """Colour and dashes of series `number`."""
    return SERIES[number % len(SERIES)], DASHES[number // len(SERIES) % len(DASHES)]


def svg(draw: Callable[[Axes], None], description: str, size: tuple[float, float] = PANEL) -> str:
    """Draw with `draw` into an inline SVG element. description: alternative text for screen
    readers."""
    figure = Figure(figsize=size)
    figure.patch.set_visible(False)
    FigureCanvasAgg(figure)
    # Fixed margins: a layout engine would draw every figure three times to find them.
    draw(figure.add_axes((0.14, 0.115, 0.84, 0.85)))
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), description)


def png(path: Path, figure: Figure) -> None:
    """Write a figure as a PNG file."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _inline(text: str, description: str) -> str:
    """Convert an SVG file to a page element: no prologue, no foreign names, no fixed size."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    text = re.sub(r"<svg[^>]*>", "", text, count=1)
    # Only clip paths and markers are referenced; all other ids would be duplicates in the page.
    text = re.sub(r' id="[A-Za-z0-9.]+_[0-9]+"', "", text)
    text = text.replace("xlink:href", "href").replace("font-family: 'DejaVu Sans'", "")
    named = {color: f"var({name})" for color, name in COLORS.items()}
    text = re.sub(r"#[0-9a-f]{6}", lambda m: named.get(m[0], m[0]), text)
    text = re.sub(r"[ \t]*\n[ \t]*", "\n", text)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{label}">{text}'


def thinned(curve: Curve, points: int = POINTS) -> tuple[list[float], list[float]]:
    """Steps and values of at most `points` points: means over equal parts of the curve."""
    if len(curve) <= points:
        return [float(s) for s, _ in curve], [v for _, v in curve]
    bounds = [round(i * len(curve) / points) for i in range(points + 1)]
    parts = [curve[a:b] for a, b in itertools.pairwise(bounds)]
    return [mean([s for s, _ in p]) for p in parts], [mean([v for _, v in p]) for p in parts]


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value with `reach` values on both sides, fewer at the ends."""
    return [mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def mean(values: Sequence[float]) -> float:
    """Mean of the values, at least one."""
    return sum(values) / len(values)


def draw_panel(ax: Axes, panel: Panel) -> None:
    """Draw the curves of a panel over steps counted from 1."""
    for line in panel.lines:
        color, dash = style_of(line.style)
        steps, values = thinned(line.curve)
        if line.dots or len(steps) == 1:
            # Dots are over the curve, outlined in the page's colour so that they stand out.
            ax.plot(steps, values, "o", ms=4, color=color, mec=PAPER, mew=0.8, clip_on=False)
        elif len(steps) >= SMOOTH_FROM:
            ax.plot(steps, values, color=color, alpha=0.3, lw=0.8)
            smooth = running_mean(values, max(2, len(values) // 25))
            ax.plot(steps, smooth, color=color, ls=dash)
        else:
            ax.plot(steps, values, color=color, ls=dash)
    if panel.from_zero:
        low, high = ax.get_ylim()
        ax.set_ylim(min(0.0, low), max(0.0, high) or 1.0)
        ax.set_ylim(bottom=0 if low >= -0.05 * high else None)
    finish_axes(ax)


def finish_axes(ax: Axes) -> None:
    """Set few ticks, with readable numbers."""
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, prune=None))
    ax.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.count(value)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.tick(value)))


def small_multiples(
    count: int, *, columns: int, header: float, footer: float
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes in rows of `columns`; header and footer are heights in inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    width, height = 3.6 * columns, 2.1 * rows + header + footer
    figure = Figure(figsize=(width, height))
    axes = []
    for number in range(count):
        row, column = divmod(number, columns)
        left, bottom = 3.6 * column + 0.45, height - header - 2.1 * row - 1.85
        axes.append(figure.add_axes((left / width, bottom / height, 3.0 / width, 1.55 / height)))
    return figure, axes


def grid_png(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Write all panels of a stage to one PNG file, with one legend."""
    figure, axes = small_multiples(len(panels), columns=3, header=0.4, footer=0.6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    handles: dict[str, Any] = {}
    for ax, panel in zip(axes, panels, strict=True):
        draw_panel(ax, panel)
        ax.set_title(panel.title, loc="left", fontsize=9)
        for line in panel.lines if len(panel.lines) > 1 else ():
            color, dash = style_of(line.style)
            handles.setdefault(line.label, ax.plot([], [], color=color, ls=dash)[0])
    if handles:
        named = list(handles.values()), list(handles)
        figure.legend(*named, loc="lower left", ncols=5, frameon=False, fontsize=8)
    png(path, figure)
