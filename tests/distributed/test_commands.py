"""Command lines in forked processes see what a fresh interpreter would see."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import Command, run_command

SCRIPT = """
import atexit, json, os, sys
import beside
atexit.register(lambda: print("at exit", file=sys.stderr))
print(json.dumps([__name__, sys.argv, os.getcwd(), os.environ.get("RANK"), os.environ["WORD"],
                  os.path.basename(beside.__file__)]))
raise SystemExit(3)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "beside.py").write_text("")
    (folder / "script.py").write_text(SCRIPT)
    return folder / "script.py"


def test_a_script_sees_what_a_fresh_process_sees(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORD", "said")
    words = ["scripts/script.py", "--option", "1"]
    forked = run_command(words, cwd=tmp_path)
    fresh = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (forked.returncode, forked.stdout) == (fresh.returncode, fresh.stdout)
    assert forked.returncode == 3
    assert forked.stderr.splitlines()[-1] == fresh.stderr.splitlines()[-1] == "at exit"


def test_ranks_of_a_command_know_their_numbers(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text("import os\nprint(os.environ['RANK'], os.environ['WORD'])")
    done = run_command([str(script)], ranks=2, env={"WORD": "said"})
    assert (done.returncode, done.stdout) == (0, "0 said\n1 said\n")
    script.write_text(
        "import os, sys, time\ntime.sleep(60) if os.environ['RANK'] == '0' else sys.exit(4)"
    )
    assert run_command([str(script)], ranks=2).returncode == 4, "and the other rank is ended"


def test_a_module_runs_and_an_error_is_shown(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ValueError('the reason')")
    done = run_command(["-m", "broken"], cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: the reason"


def test_a_command_gets_signals_and_is_ended_when_late(tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text("import time\nprint('ready', flush=True)\ntime.sleep(1000)\n")
    with Command([str(script)]) as command:
        while "ready" not in command.said("stdout"):
            assert command.poll() is None, command.said()
            time.sleep(0.01)
        command.send_signal(signal.SIGINT)
        assert command.wait(60).returncode != 0
        assert "KeyboardInterrupt" in command.said()
    with Command([str(script)]) as late, pytest.raises(subprocess.TimeoutExpired):
        late.wait(0.2)
