"""Effects of stages in words, as a table and as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from nemocascade.cascade.effects import Effect, Effects
from nemocascade.cascade.report import figures, words
from nemocascade.cascade.report.figures import ALARM, INK, MUTED, PAPER

LOSS_TO_GAIN = LinearSegmentedColormap.from_list("change", ["#e8956b", PAPER, "#6aaad5"])


def sentences(effects: Effects) -> list[str]:
    """The significant effects in words, and what a later stage wins back or takes away."""
    found = []
    for name, cells in effects.alone.items():
        for column, effect in enumerate(cells):
            if not effect.significant:
                continue
            domain = effects.domains[column]
            lost = effect.change < 0
            what, size = words.words(domain), amount(effects, column, effect)
            change = f"costs {what} {size}" if lost else f"raises {what} by {size}"
            parts = [f"{words.words(name)} {change}"]
            for (first, second), later in effects.second.items():
                other = later[column]
                if first == name and other.significant and (other.change > 0) == lost:
                    back = "restores" if lost else "takes away"
                    size = amount(effects, column, other)
                    parts.append(f"{words.words(second)} after it {back} {size}")
            found.append(f"{'; '.join(parts)}.")
    if not found:
        found = ["No stage changes a domain by more than noise explains."]
    if effects.seeds < 2:
        found.append(
            "The errors cover the tasks and their samples, not the training seed: --seeds 2 or "
            "more measures that too."
        )
    return found


def amount(effects: Effects, column: int, effect: Effect) -> str:
    """Size of an effect with its standard error, in points where the domain has them."""
    if not effects.in_points(column):
        return f"{abs(effect.change):.2f} ± {effect.standard_error:.2f}"
    return f"{100 * abs(effect.change):.0f} ± {100 * effect.standard_error:.0f} points"


def table(effects: Effects) -> str:
    """The matrix as text: stages in rows, domains in columns, * for significant changes."""
    rows = [["", *effects.domains]]
    rows += [[name, *_cells(effects, found)] for name, found in effects.alone.items()]
    rows += [
        [f"{b} after {a}", *_cells(effects, found)] for (a, b), found in effects.second.items()
    ]
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(cells, others, strict=True))])
        for name, *cells in rows
    )


def _cells(effects: Effects, found: Sequence[Effect]) -> list[str]:
    return [cell(effects, column, effect) for column, effect in enumerate(found)]


def cell(effects: Effects, column: int, effect: Effect) -> str:
    """A change with its standard error and the mark of significance."""
    unit, digits = (100, 1) if effects.in_points(column) else (1, 2)
    mark = "*" if effect.significant else ""
    change, error = unit * effect.change, unit * effect.standard_error
    return f"{change:+.{digits}f}±{error:.{digits}f}{mark}"


def matrix_rows(effects: Effects) -> list[tuple[str, str, list[Effect]]]:
    """Rows of the matrix: stage, the stage before it ("" for none), effects by domain."""
    rows = [(name, "", found) for name, found in effects.alone.items()]
    return rows + [(b, a, found) for (a, b), found in effects.second.items()]


def share_of_scale(effects: Effects, column: int, effect: Effect) -> float:
    """A change on a scale of -1..1, which is full at 50 points, or at a domain's largest change."""
    if effects.in_points(column):
        return max(-1.0, min(1.0, 2 * effect.change))
    largest = max(abs(found[column].change) for _, _, found in matrix_rows(effects))
    return effect.change / largest if largest else 0.0


def effects_png(path: Path, effects: Effects) -> None:
    """Write the matrix as a PNG file: stages in rows, domains in columns."""
    rows = matrix_rows(effects)
    figure = Figure(
        figsize=(2.6 + 1.0 * len(effects.domains), 1.4 + 0.36 * len(rows)), layout="constrained"
    )
    ax = figure.add_subplot()
    shares = np.array(
        [[share_of_scale(effects, c, e) for c, e in enumerate(found)] for _, _, found in rows]
    )
    ax.imshow(shares, cmap=LOSS_TO_GAIN, vmin=-1, vmax=1, aspect="auto")
    for row, (name, _, found) in enumerate(rows):
        for column, effect in enumerate(found):
            trained = effects.domains[column] in effects.measured.trains[name]
            ax.text(
                column, row, cell(effects, column, effect), ha="center", va="center", fontsize=7.5,
                color=MUTED if not effect.significant else INK if effect.change > 0 else ALARM,
                fontweight="bold" if trained else "normal",
            )  # fmt: skip
    ax.set_xticks(
        range(len(effects.domains)), [words.label(d) for d in effects.domains],
        rotation=30, ha="left", rotation_mode="anchor",
    )  # fmt: skip
    names = [words.label(n) + (f" after {words.label(a)}" if a else "") for n, a, _ in rows]
    ax.set_yticks(range(len(rows)), names)
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelcolor=INK)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    if effects.second:
        ax.axhline(len(effects.alone) - 0.5, color=PAPER, lw=6)
    ax.set_xlabel("change ± standard error    bold: trained by the stage    *: significant")
    figures.png(path, figure)
