"""Runs command lines in processes forked from the servers of `helpers.ranks`.

A fresh interpreter takes about ten seconds of a core to import torch and Megatron-Core; a fork has
them already. Everything else is as in a fresh process: environment, folder, `sys.argv`, `__main__`,
signals, output and exit code.

    done = run_command(["recipes/tiny/sft.py", "--steps", "2"])
    done = run_command(["-m", "nemocascade.cli", "score", folder], cwd=tmp_path)
    done = run_command(["recipes/tiny/sft.py", "--parallel.tp", "2"], ranks=2)
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from helpers.ranks import REPOSITORY, Rank

LIMIT_S = 300.0
POLL_S = 0.02


class Command:
    """A command under way in `ranks` processes, or in one that knows nothing of ranks."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        cwd: Path = REPOSITORY,
        env: Mapping[str, str] | None = None,
        ranks: int = 0,
    ) -> None:
        """Start `python WORDS` in the folder `cwd`.

        env: variables besides those of this process.
        """
        self.words = list(words)
        self._folder = tempfile.TemporaryDirectory(prefix="command-")
        job = Path(self._folder.name)
        kwargs = {"words": self.words, "cwd": str(cwd)}
        target = "helpers.commands:_run_words"
        (job / "request.json").write_text(json.dumps({"target": target, "kwargs": kwargs}))
        self._job, self._ranks = job, list[Rank]()
        port = 0
        if ranks:
            from torch.distributed import TCPStore

            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            port = self._store.port
        for rank in range(ranks or 1):
            self._ranks.append(Rank(rank, ranks, job, port, env or {}))

    @property
    def pid(self) -> int:
        """Process id of the first rank."""
        return self._ranks[0].pid

    def poll(self) -> int | None:
        """The exit code, that of the first rank that failed; None while a rank runs."""
        codes = [rank.poll() for rank in self._ranks]
        if failed := [code for code in codes if code]:
            return failed[0]
        return None if None in codes else 0

    def said(self, stream: str = "stderr") -> str:
        """Output of all ranks so far, to `stdout` or `stderr`."""
        paths = [self._job / f"{stream}.{rank}" for rank in range(len(self._ranks))]
        return "".join(p.read_text(errors="replace") for p in paths if p.exists())

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the first rank."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
        """Exit code and output; raises TimeoutExpired, and ends the command, after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        try:
            while (code := self.poll()) is None:
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(
                        self.words, timeout_s, self.said("stdout"), self.said()
                    )
                time.sleep(POLL_S)
        finally:
            for rank in self._ranks:
                rank.kill()
        return subprocess.CompletedProcess(self.words, code, self.said("stdout"), self.said())

    def close(self) -> None:
        """End the command if it is still under way, and remove its output."""
        for rank in self._ranks:
            rank.kill()
        self._folder.cleanup()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_command(
    words: Sequence[str],
    *,
    cwd: Path = REPOSITORY,
    env: Mapping[str, str] | None = None,
    ranks: int = 0,
    timeout_s: float = LIMIT_S,
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` to its end, in `ranks` processes as torchrun would, or in one."""
    with Command(words, cwd=cwd, env=env, ranks=ranks) as command:
        return command.wait(timeout_s)


def _run_words(words: list[str], cwd: str) -> None:
    """Run a script or a module of this process as its main program."""
    os.chdir(cwd)
    # A background shell lets its programs ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, cwd)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        # The rank ends without the interpreter's own shutdown.
        atexit._run_exitfuncs()
