"""Answers that a judge gave, in memory and, where asked, in a file that outlives the run."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import OrderedDict
from pathlib import Path
from threading import Lock

from nemocascade.runtime.jsonl import read_undamaged
from nemocascade.runtime.logging import LOGGER

MAX_CHARACTERS = 2**28
"""Text that is kept in memory; the answers used longest ago are forgotten."""
LONGEST_WAIT_S = 5.0
"""For another process that writes to the file; then an answer stays in memory alone."""
PAUSE_S = 60.0
"""After a failure to write, in which nothing is written: judges must not wait for a disk."""


class AnswerCache:
    """Answers by the hash of what was asked. Threads may share one, and processes its file.

    path: a JSONL file of `key` and `text`, appended to; empty = memory only. It is read when an
    answer is first looked for. Lines that a killed process left unfinished are skipped and counted.
    """

    def __init__(self, path: str = "", max_characters: int = MAX_CHARACTERS) -> None:
        self.path = path
        self._max = max_characters
        self._size = 0
        self._texts: OrderedDict[str, str] = OrderedDict()
        self._lock, self._file_lock = Lock(), Lock()
        self._unread = bool(path)
        self._paused_until = 0.0

    def get(self, key: str) -> str | None:
        """The answer, or None."""
        with self._lock:
            if self._unread:
                self._unread = False
                try:
                    self._read()
                except OSError as error:
                    LOGGER.warning("the cache %s cannot be read: %s", self.path, error)
            text = self._texts.get(key)
            if text is not None:
                self._texts.move_to_end(key)
            return text

    def put(self, key: str, text: str) -> None:
        """Keep an answer. Raises OSError if the file cannot be written; memory has it then."""
        with self._lock:
            self._keep(key, text)
        if not self.path:
            return
        # Not under the other lock: a slow file system must not stop those who look for answers.
        with self._file_lock:
            if time.monotonic() < self._paused_until:
                return
            try:
                self._append(json.dumps({"key": key, "text": text}) + "\n")
            except OSError:
                self._paused_until = time.monotonic() + PAUSE_S
                raise

    def _keep(self, key: str, text: str) -> None:
        self._size += len(text) - len(self._texts.pop(key, ""))
        self._texts[key] = text
        while self._size > self._max and len(self._texts) > 1:
            self._size -= len(self._texts.popitem(last=False)[1])

    def _append(self, line: str) -> None:
        """One write under a lock, so that lines of several processes don't mix."""
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        with Path(self.path).open("a+b", buffering=0) as file:
            _take(file.fileno())
            end = file.seek(0, os.SEEK_END)
            # A process that was killed may have left a line without its end.
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                line = "\n" + line
            file.write(line.encode())

    def _read(self) -> None:
        if not Path(self.path).exists():
            return
        broken: list[str] = []
        for line, row in read_undamaged(self.path, broken.append):
            key, text = row.get("key"), row.get("text")
            if isinstance(key, str) and isinstance(text, str):
                self._keep(key, text)
            else:
                broken.append(line)
        if broken:
            LOGGER.warning("%s: %d lines hold no answer and are skipped", self.path, len(broken))


def _take(descriptor: int) -> None:
    """Lock a file until it is closed. Raises OSError if another process holds it for too long."""
    end = time.monotonic() + LONGEST_WAIT_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
