"""The status line stays below the log, fits the terminal, and never reaches files."""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from nemocascade.runtime.errors import exit_cleanly
from nemocascade.runtime.logging import (
    FILE_ONLY,
    LOGGER,
    Console,
    StatusPart,
    fitted,
    start_logging,
    terminal,
    terminal_width,
)

ROOT = Path(__file__).resolve().parents[2]


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """The visible lines: a carriage return and an erasure empty the line."""
        rows = [""]
        for text in re.split(r"(\r\x1b\[2K|\n)", self.getvalue()):
            if text == "\n":
                rows.append("")
            elif text == "\r\x1b[2K":
                rows[-1] = ""
            else:
                rows[-1] += text
        return rows


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Screen:
    found = Screen()
    monkeypatch.setattr(sys, "stderr", found)
    start_logging(tmp_path, is_main=True)
    return found


def test_log_lines_appear_above_the_status_line(screen: Screen, tmp_path: Path) -> None:
    live = terminal()
    assert live is not None
    live.show("step 1")
    LOGGER.info("a checkpoint")
    live.show("step 2")
    LOGGER.warning("a warning")
    first, second, last = screen.lines()
    assert first.endswith("I a checkpoint")
    assert second.endswith("W a warning")
    assert last == "step 2"
    live.show("step 3", keep=True)
    LOGGER.info("the artifact")
    assert screen.lines()[2] == "step 3"
    assert screen.lines()[3].endswith("the artifact")
    start_logging(None, is_main=True)
    text = (tmp_path / "log.txt").read_text()
    assert "a warning" in text
    assert "step" not in text


def test_a_stage_leaves_no_status_line_behind(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = terminal()
    assert live is not None
    live.show("step 1")
    monkeypatch.setattr(sys, "stderr", screen)
    start_logging(None, is_main=True)
    LOGGER.info("the next stage")
    assert [line.endswith("the next stage") for line in screen.lines()] == [True, False]


def test_records_for_the_file_stay_there(screen: Screen, tmp_path: Path) -> None:
    LOGGER.info("a long table", extra=FILE_ONLY)
    start_logging(None, is_main=True)
    assert "a long table" in (tmp_path / "log.txt").read_text()
    assert "a long table" not in screen.getvalue()


def test_without_a_terminal_there_is_no_status_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    start_logging(tmp_path, is_main=True)
    assert terminal() is None
    monkeypatch.setattr(sys, "stderr", Screen())
    start_logging(tmp_path, is_main=False)
    assert terminal() is None, "only the main rank has one"


def test_a_traceback_does_not_stand_behind_the_status_line(screen: Screen) -> None:
    live = terminal()
    assert live is not None
    live.show("step 1")
    with pytest.raises(ValueError, match="a bug"):
        exit_cleanly(lambda: int("a bug"))
    assert screen.lines() == [""]


def test_a_terminal_that_is_gone_does_not_end_the_run(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    live = terminal()
    assert live is not None
    live.show("step 1")

    def gone(_: str) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(screen, "write", gone)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    LOGGER.info("a checkpoint")
    live.show("step 2", keep=True)
    start_logging(None, is_main=True)
    assert "a checkpoint" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("columns", [1, 2, 12, 200])
def test_a_narrow_terminal_does_not_wrap_its_last_line(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = os.terminal_size((columns, 24))
    monkeypatch.setattr(os, "get_terminal_size", lambda _: size)
    width = terminal_width()
    assert width == max(1, columns - 1)
    assert len(fitted([StatusPart("step 3/15", 0), StatusPart("reward 0.41", 1)], width)) <= width


@pytest.mark.parametrize("width", range(1, 60))
def test_a_line_fits_any_width_with_its_most_important_parts(width: int) -> None:
    parts = [
        StatusPart("[2/10 if_rl]", 1),
        StatusPart("step 3/15", 0),
        StatusPart("", 2),
        StatusPart("reward 0.41", 2),
    ]
    parts += [StatusPart("grad norm 1.20", 9), StatusPart("40 s left", 3)]
    line = fitted(parts, width)
    assert len(line) <= width
    whole = [p.rank for p in parts if p.text and p.text in line]
    # No part is shown while a more important one is omitted.
    assert whole == sorted(whole, key=[1, 0, 2, 9, 3].index)
    assert not whole or max(whole) < 9 or len(whole) == 5
    if width >= 9:
        assert "step 3/15" in line


def test_a_console_knows_what_it_has_shown() -> None:
    console = Console()
    assert [console.is_new(text) for text in ("a", "b", "a")] == [True, True, False]


SCRIPT = """
from pathlib import Path
from nemocascade.recipe import LogConfig, SftRecipe
from nemocascade.runtime.logging import Console, start_logging
from nemocascade.train.progress import Progress
start_logging(None, is_main=True)
progress = Progress(Console("2/10 if_rl"), steps=3, first_step=0)
for step in range(3):
    progress.show_activity("rollout: generation", "3 of 8 sequences done")
    progress.show(step, {"reward": 0.25, "response_tokens": 31.0, "truncated": 0.5, "mfu": 0.1})
"""


def test_a_real_terminal_gets_lines_of_its_width() -> None:
    main, child = pty.openpty()
    width = 50
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stderr=child, env={**os.environ, "PYTHONPATH": path}
    )
    os.close(child)
    written = b""
    while True:
        try:
            found = os.read(main, 4096)
        except OSError:
            break
        if not found:
            break
        written += found
    assert done.wait(timeout=60) == 0
    lines = [line for line in re.split(r"[\r\n]|\x1b\[2K", written.decode()) if line]
    shown = [line for line in lines if "step" in line]
    assert any("step 3/3" in line for line in shown)
    assert all(len(line) < width for line in shown)
    assert all("reward 0.25" in line for line in shown if "step 0/3" not in line)
