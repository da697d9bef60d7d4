"""Readable numbers, durations and names."""

from __future__ import annotations

import math

SHORT = frozenset(("sft", "rl", "if", "mopd", "grpo", "rlhf", "swe", "stem"))
"""Words of names that are written in capitals."""
MINUS = "\N{MINUS SIGN}"


def number(value: float) -> str:
    """Three significant digits: 0.00314, 1.27, 84.1, 12.3 k, 4.1e−7."""
    size = abs(value)
    if size >= 999.5:
        return count(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return _sign(f"{mantissa}e{int(exponent)}")
    digits = max(0, 2 - math.floor(math.log10(size)))
    return _sign(f"{value:.{digits}f}")


def count(value: float) -> str:
    """A count: 812, 9,120, 48.3 k, 3.21 M, 1.7 B."""
    size = abs(value)
    if size < 9_999.5:
        return _sign(f"{value:,.0f}")
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= 0.9995 * unit:
            return _sign(f"{value / unit:.3g}") + f" {name}"
    raise AssertionError(value)


def percent(share: float) -> str:
    """A share in percent: 0.4 %, 12 %, 100 %."""
    value = 100 * share
    return f"{value:.1f} %" if 0 < abs(value) < 9.95 else f"{value:.0f} %"


def duration(seconds: float) -> str:
    """A duration: 4.2 s, 58 s, 12 min 31 s, 3 h 05 min, 2 d 04 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def score(value: float | None, *, points: bool, signed: bool = False) -> str:
    """A held-out score, in points of 100 or unscaled; signed: with a plus sign; "" for None."""
    if value is None:
        return ""
    text = f"{100 * value:.1f}" if points else f"{value:.2f}"
    if float(text) == 0:
        text = text.lstrip("-")
    elif signed and value > 0:
        text = f"+{text}"
    return _sign(text)


def tick(value: float) -> str:
    """Shortest text of a round number, for axis ticks."""
    size = abs(value)
    if size >= 10_000:
        return count(value)
    if size >= 1e-3 or value == 0:
        return _sign(f"{value:.4g}")
    mantissa, exponent = f"{value:.4e}".split("e")
    return _sign(f"{float(mantissa):g}e{int(exponent)}")


def words(name: str) -> str:
    """An identifier as words: instruction_following -> instruction following."""
    return " ".join(w.upper() if w in SHORT else w for w in name.split("_"))


def label(name: str, longest: int = 26) -> str:
    """An identifier as words, shortened to fit a figure."""
    text = words(name)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _sign(text: str) -> str:
    return text.replace("-", MINUS)
