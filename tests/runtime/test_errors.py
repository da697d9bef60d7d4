"""Ends of a program: user errors, full disks, Ctrl-C, and what a terminal is shown."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemocascade.megatron.checkpoint.errors import (
    CheckpointError,
    FolderError,
    NonFiniteWeightsError,
    StorageProblem,
)
from nemocascade.megatron.convert.config_fields import ConfigError
from nemocascade.recipe import RecipeError, SftRecipe, UserError
from nemocascade.rl.rollout_records import DamagedRecordError
from nemocascade.rollout.servers import ServersLostError
from nemocascade.runtime import errors
from nemocascade.runtime.command_line import parse_settings
from nemocascade.runtime.errors import exit_cleanly
from nemocascade.runtime.files import naming, write_text
from nemocascade.runtime.interrupt import AGAIN_S, Interrupt
from nemocascade.runtime.launcher import MainRankError
from nemocascade.runtime.logging import LOGGER, printable, start_logging
from nemocascade.runtime.run_lock import FolderInUseError
from nemocascade.serving.api import ApiError


def fails_with(error: BaseException) -> int:
    def work() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        exit_cleanly(work)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    "error",
    [
        RecipeError(["a is 1: set --a 2", "b"]),
        ConfigError(["a model of another kind"]),
        FolderError("folder", ["no manifest"]),
        CheckpointError(Path("folder"), [StorageProblem("a disk that is full")]),
        NonFiniteWeightsError("folder", ["weight"]),
        ApiError("too long", "max_tokens", 413),
        DamagedRecordError(7, "a checksum"),
        ServersLostError("none answers"),
        MainRankError("rank 0 failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_reaches_another_process_as_it_is(error: Exception) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


def test_a_text_on_a_full_disk_names_its_file() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        write_text(Path("/dev/full"), "text")
    assert caught.value.filename == "/dev/full"


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(errors, "GRACE_S", 0.0)


def test_a_user_error_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails_with(UserError("steps(0): set \x1b[31m--steps 1")) == 2
    assert capsys.readouterr().err == "error: steps(0): set \\x1b[31m--steps 1\n"


def test_a_job_script_learns_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun ends with 1 for all of them."""
    monkeypatch.setenv("NEMOCASCADE_EXIT_CODE", str(tmp_path / "code"))
    for error, code in (
        (UserError("x"), 2),
        (FolderInUseError("x"), 75),
        (ServersLostError("x"), 75),
        (KeyboardInterrupt(), 130),
    ):
        assert fails_with(error) == code
        assert (tmp_path / "code").read_text() == f"{code}\n"
    (tmp_path / "code").unlink()
    with pytest.raises(ValueError, match="a bug"):
        exit_cleanly(lambda: int("a bug"))
    assert not (tmp_path / "code").exists()


def test_a_job_script_learns_of_unknown_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start with the same arguments would end alike."""
    monkeypatch.setenv("NEMOCASCADE_EXIT_CODE", str(tmp_path / "code"))
    for arguments in (["--steps", "many"], ["--stepz", "7"]):
        with pytest.raises(SystemExit):
            parse_settings(SftRecipe, arguments, default=SftRecipe())
        assert (tmp_path / "code").read_text() == "2\n"
        (tmp_path / "code").unlink()
    with pytest.raises(SystemExit):
        parse_settings(SftRecipe, ["--help"], default=SftRecipe())
    assert not (tmp_path / "code").exists()


def test_ctrl_c_says_how_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails_with(KeyboardInterrupt()) == 130
    assert "the same command resumes" in capsys.readouterr().err


def test_a_full_disk_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="No space left") as caught, naming("/run/rank_0.safetensors"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert fails_with(caught.value) == 75
    assert "error: /run/rank_0.safetensors: No space left on device" in capsys.readouterr().err
    with pytest.raises(PermissionError):
        exit_cleanly(lambda: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))


def test_a_path_that_cannot_be_used_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        exit_cleanly(lambda: (tmp_path / "file" / "folder").mkdir(parents=True))
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert f"error: {tmp_path}/file/folder: Not a directory: name a path" in said


@pytest.mark.parametrize(
    ("rank", "local", "shown"), [("0", "0", True), ("8", "0", True), ("9", "1", False)]
)
def test_each_node_shows_an_error_once(
    rank: str,
    local: str,
    shown: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "error.json"
    for name, value in (
        ("RANK", rank),
        ("LOCAL_RANK", local),
        ("TORCHELASTIC_ERROR_FILE", str(file)),
    ):
        monkeypatch.setenv(name, value)
    assert fails_with(UserError("the reason")) == 2
    assert ("the reason" in capsys.readouterr().err) == shown
    assert json.loads(file.read_text())["message"]["extraInfo"]["py_callstack"] == (
        "error: the reason"
    )
    assert fails_with(MainRankError("its reason")) == 2
    assert capsys.readouterr().err == ""
    assert json.loads(file.read_text())["message"]["message"] == "its reason"


def test_torchrun_shows_the_message(tmp_path: Path) -> None:
    """The last rank alone fails, and no rank prints anything."""
    script = tmp_path / "job.py"
    script.write_text(
        "import os, time\n"
        "from nemocascade.recipe import UserError\n"
        "from nemocascade.runtime.errors import exit_cleanly\n"
        "def work():\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise UserError('rank 1 has no disk')\n"
        "    time.sleep(60)\n"
        "exit_cleanly(work)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "error: rank 1 has no disk" in done.stderr


def test_the_log_obeys_no_escape_sequence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start_logging(tmp_path, is_main=True)
    try:
        LOGGER.warning("row %s", "\x1b[2Jgone \ud83d \u202eevil\x9b1m\ttab\nnext \N{SNOWMAN}")
    finally:
        for handler in LOGGER.handlers[:]:
            LOGGER.removeHandler(handler)
            handler.close()
        LOGGER.propagate = True
        LOGGER.setLevel(logging.NOTSET)
    said = "row \\x1b[2Jgone \\ud83d \\u202eevil\\x9b1m\ttab\nnext \N{SNOWMAN}\n"
    assert capsys.readouterr().err.endswith(said)
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").endswith(said)


def test_printable_keeps_what_languages_need() -> None:
    text = "äöü 漢字 \N{ZERO WIDTH JOINER} 👩\u200d🔬\t\n"
    assert printable(text) == text


def test_the_first_ctrl_c_asks_and_a_later_one_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt = Interrupt(speaks=False)
    clock = iter([100.0, 100.5, 100.0 + AGAIN_S + 1])
    monkeypatch.setattr("nemocascade.runtime.interrupt.time.monotonic", lambda: next(clock))
    interrupt.arm()
    try:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
        signal.raise_signal(signal.SIGINT)  # as torchrun passes it on
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        interrupt.disarm()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
