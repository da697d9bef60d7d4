"""The project's logger and its handlers."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

LOGGER = logging.getLogger("nemocascade")


def start_logging(run_dir: Path, *, is_main: bool) -> logging.Logger:
    """Send the log to the terminal and to RUN/log.txt on the main rank; warnings only elsewhere."""
    for handler in LOGGER.handlers[:]:
        LOGGER.removeHandler(handler)
        handler.close()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO if is_main else logging.WARNING)
    line = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(run_dir / "log.txt"))
    for handler in handlers:
        handler.setFormatter(line)
        LOGGER.addHandler(handler)
    return LOGGER
