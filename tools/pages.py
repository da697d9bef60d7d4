"""Tables that tools write into pages of docs/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path


def update(
    page: Path, marks: tuple[str, str], table: Callable[[], str], arguments: Sequence[str]
) -> int:
    """Write the table between the marks of a page; with --check, exit code 1 if it is not there."""
    begin, end = marks
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(begin)
    new = f"{before}{begin}{table()}{end}{rest.split(end)[1]}"
    if "--check" in arguments:
        return int(new != text)
    page.write_text(new, encoding="utf-8")
    return 0
