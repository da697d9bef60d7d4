"""Cache of a judge's answers, in memory and optionally in a file that outlives the run."""

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
"""Maximum characters in memory; the least recently used answers are evicted."""
LONGEST_WAIT_S = 5.0
"""Timeout of the lock on the file; after it, an answer stays in memory only."""
PAUSE_S = 60.0
"""Pause of writing after a failed write: judges must not wait for a disk."""


class AnswerCache:
    """Answers by the hash of the question. Threads may share one; processes may share its file.

    path: a JSONL file of `key` and `text`, appended to; empty = memory only. It is read at the
    first lookup. Incomplete lines of killed processes are skipped and counted.
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
        """Return the answer, or None."""
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
        """Store an answer. Raises OSError if the file cannot be written; memory has it anyway."""
        with self._lock:
            self._keep(key, text)
        if not self.path:
            return
        # A separate lock: a slow file system must not block lookups.
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
        """Append in one write under a lock, so that lines of several processes don't mix."""
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        with Path(self.path).open("a+b", buffering=0) as file:
            _take(file.fileno())
            end = file.seek(0, os.SEEK_END)
            # A killed process may have left a line without its end.
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
