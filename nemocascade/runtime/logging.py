"""The project's logger, its handlers, and the status line at the bottom of a terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

LOGGER = logging.getLogger("nemocascade")
FILE_ONLY = {"file_only": True}
"""`extra` of a record that belongs to RUN/log.txt and not to the terminal."""
ERASE = "\r\x1b[2K"
"""Returns to the start of the terminal's line and erases it."""
# Control characters but tab and line feed, surrogates, and marks that reorder or break lines.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text with every character escaped that a terminal would obey or could not encode.

    Answers of models and rows of data get into messages, and may hold escape sequences.
    """
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class Terminal(logging.StreamHandler[TextIO]):
    """Writes log lines to stderr, above a status line that is always the last one.

    is_live: stderr is a terminal; elsewhere there is no status line.
    """

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.is_live = self.stream.isatty()
        self._status = ""
        self.addFilter(lambda record: not getattr(record, "file_only", False))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a log line; the status line moves below it."""
        if self._status:
            self._write(ERASE)
        super().emit(record)
        if self._status:
            self._write(self._status)

    def show(self, line: str, *, keep: bool = False) -> None:
        """Replace the status line. keep: it stays as a line of its own."""
        with self.lock or contextlib.nullcontext():
            self._write(ERASE + line + "\n" * keep)
            self._status = "" if keep else line

    def _write(self, text: str) -> None:
        # A terminal that was closed must not end the run; the log's lines pass over it too.
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
            self.flush()

    def close(self) -> None:
        """Erase the status line and detach from the stream."""
        if self._status:
            self.show("")
        super().close()


@dataclass(frozen=True)
class StatusPart:
    """A part of a status line. rank: parts with the highest number are dropped first."""

    text: str
    rank: int


def fitted(parts: Sequence[StatusPart], width: int) -> str:
    """One line of at most `width` characters with the most important parts, in their order."""
    kept = [part for part in parts if part.text]
    while len(line := "  ".join(part.text for part in kept)) > width and len(kept) > 1:
        kept.remove(max(kept, key=lambda part: part.rank))
    return line if len(line) <= width else f"{line[: max(0, width - 1)]}…"


def terminal() -> Terminal | None:
    """The handler of a live terminal; None if stderr is a file or this is not the main rank."""
    found = (h for h in LOGGER.handlers if isinstance(h, Terminal) and h.is_live)
    return next(found, None) if LOGGER.level <= logging.INFO else None


def end_status() -> None:
    """Erase the status line."""
    if (live := terminal()) is not None:
        live.show("")


def terminal_width() -> int:
    """Columns of the terminal of stderr, without the last one, where some terminals wrap."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return max(1, (columns or shutil.get_terminal_size().columns) - 1)


@dataclass
class Console:
    """State of a job's terminal across the stages of a cascade.

    label: the stage's place, such as `3/10 if_rl`; empty outside of a cascade. start_score: mean
    held-out score of the stage's domains before it, if it is known.
    """

    label: str = ""
    start_score: float | None = None
    _seen: set[str] = field(default_factory=set)

    def is_new(self, text: str) -> bool:
        """True the first time that a cascade asks about this text."""
        new = text not in self._seen
        self._seen.add(text)
        return new


def start_logging(run_dir: Path | None, *, is_main: bool) -> logging.Logger:
    """Send the log to the terminal and to RUN/log.txt on the main rank; errors only elsewhere.
    Without a run folder, to the terminal alone.

    Warnings are the same on all ranks, or gathered by the main rank.
    """
    for handler in LOGGER.handlers[:]:
        LOGGER.removeHandler(handler)
        handler.close()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO if is_main else logging.ERROR)
    line = _Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [Terminal()]
    if is_main and run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(run_dir / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(line)
        LOGGER.addHandler(handler)
    return LOGGER
