"""The project's logger and its handlers."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

LOGGER = logging.getLogger("nemocascade")
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


def start_logging(run_dir: Path, *, is_main: bool) -> logging.Logger:
    """Send the log to the terminal and to RUN/log.txt on the main rank; errors only elsewhere.

    Warnings are the same on all ranks, or gathered by the main rank.
    """
    for handler in LOGGER.handlers[:]:
        LOGGER.removeHandler(handler)
        handler.close()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO if is_main else logging.ERROR)
    line = _Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(run_dir / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(line)
        LOGGER.addHandler(handler)
    return LOGGER
