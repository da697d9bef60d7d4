"""Jobs whose ranks start in place of torchrun's, forked from processes that have imported torch.

A job's script runs `Launcher.command` as its torchrun. That program asks for a start by a file, and
a thread of the test's process starts the ranks and ends all of them when one has failed, as
torchrun does.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

from helpers.ranks import Rank

GRACE_S = 30.0
"""Seconds between the signals SIGTERM and SIGKILL to the ranks beside one that has failed, as of
torchrun: the watchdog names a silent rank within 20."""

SCRIPT = """#!/bin/bash
env -0 > "{folder}/$$.draft"
mv "{folder}/$$.draft" "{folder}/$$.start"
until [ -e "{folder}/$$.end" ]; do /bin/sleep 0.1; done
exit "$(cat "{folder}/$$.end")"
"""


class Launcher:
    """Starts `target(**kwargs)` on `size` ranks for each call of its command.

    target: a function as `run_ranks` takes it, as text. Use it as a context manager.
    """

    def __init__(self, folder: Path, target: str, size: int, kwargs: dict[str, str]) -> None:
        self.folder, self.size = folder, size
        self.request = json.dumps({"target": target, "kwargs": kwargs})
        folder.mkdir()
        self.command = folder / "torchrun"
        self.command.write_text(SCRIPT.format(folder=folder))
        self.command.chmod(0o755)
        self.logs: list[Path] = []
        """A folder for each start, with the outputs of its ranks."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="launcher")

    def __enter__(self) -> Launcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def text(self) -> str:
        """The errors of all ranks of all starts."""
        files = [log / f"stderr.{rank}" for log in self.logs for rank in range(self.size)]
        return "\n".join(f"--- {f}\n{f.read_text()[-1500:]}" for f in files if f.exists())

    def _serve(self) -> None:
        while not self._stop.wait(0.1):
            for asked in self.folder.glob("*.start"):
                pid = int(asked.stem)
                pairs = asked.read_text().split("\0")
                asked.unlink()
                code = self._run(dict(p.split("=", 1) for p in pairs if "=" in p), pid)
                draft = self.folder / f"{pid}.code"
                draft.write_text(str(code))
                draft.rename(self.folder / f"{pid}.end")

    def _run(self, variables: dict[str, str], pid: int) -> int:
        """Run the ranks to their end; 1 if one has failed or the job's step, `pid`, is gone."""
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        log = self.folder / f"log.{len(self.logs)}"
        log.mkdir()
        self.logs.append(log)
        (log / "request.json").write_text(self.request)
        named = {k: v for k, v in variables.items() if k.startswith(("NEMOCASCADE_", "SLURM"))}
        ranks = [Rank(rank, self.size, log, store.port, named) for rank in range(self.size)]
        try:
            while not self._stop.is_set() and _is_there(pid):
                codes = [rank.poll() for rank in ranks]
                if all(code == 0 for code in codes):
                    return 0
                if any(codes):
                    _terminate(ranks)
                    break
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()
        return 1


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _terminate(ranks: list[Rank]) -> None:
    """Ask the ranks to end, and wait for them for a while."""
    for rank in ranks:
        if rank.poll() is None:
            os.kill(rank.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
