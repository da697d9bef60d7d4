"""The lock of a run folder: one job owns it, and every other one is rejected by name.

The lock is the file RUN/lock. It is created by a hard link, which is atomic on network file systems
too, and names its owner. A thread of the owner touches the file every INTERVAL_S: its heartbeat.
Another job decides by what it sees, never by comparing clocks of two hosts:

    the same host, and the process is alive         rejected at once
    the same host, and the process is gone          taken over at once
    the same Slurm job, requeued since              taken over at once
    another host, and the heartbeat changes         rejected
    another host, no heartbeat within STALE_S       taken over

An owner that finds another's lock in place of its own, for example after it was suspended, ends.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import signal
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType

from nemocascade.recipe import UserError
from nemocascade.runtime.files import naming
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.stopping import AGAIN
from nemocascade.runtime.stored_records import record_of

NAME = "lock"
INTERVAL_S = 5.0
STALE_S = 60.0


class FolderInUseError(UserError, RuntimeError):
    """Another job owns the run folder; the message names it."""

    exit_code = AGAIN


@dataclass(frozen=True)
class Owner:
    """The owner of a run folder, as its lock file names it.

    namespace: kernel boot and process namespace, in which `pid` counts. started_s: start of the
    process in seconds since the boot, which tells it from a later one with the same number; setting
    the clock does not change it. job, restarts: Slurm's job id and the number of its requeues.
    token: differs between all owners.
    """

    host: str = field(default_factory=socket.gethostname)
    namespace: str = field(default_factory=lambda: _namespace())
    pid: int = field(default_factory=os.getpid)
    started_s: float = field(default_factory=lambda: _started_s(os.getpid()))
    job: str = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID", ""))
    restarts: int = field(default_factory=lambda: int(os.environ.get("SLURM_RESTART_COUNT") or 0))
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def text(self) -> str:
        """Description for messages."""
        job = f" of Slurm job {self.job}" if self.job else ""
        return f"process {self.pid}{job} on {self.host}"

    def is_alive(self, seen_by: Owner) -> bool | None:
        """True if the process runs, False if it has ended, None if `seen_by` cannot tell."""
        if (self.host, self.namespace) != (seen_by.host, seen_by.namespace):
            return None
        try:
            return abs(_started_s(self.pid) - self.started_s) < 1.0
        except (FileNotFoundError, ProcessLookupError):
            return False
        except OSError:
            return None


class RunLock:
    """The lock of a run folder. The main rank acquires it before it writes anything there.

    option: names the folder on the command line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        option: str = "--run-dir",
        interval_s: float = INTERVAL_S,
        stale_s: float = STALE_S,
    ) -> None:
        self.folder, self.path, self.option = folder, folder / NAME, option
        self.interval_s, self.stale_s = interval_s, stale_s
        self.owner = Owner()
        self.note = ""
        """Reason why a stale lock was taken over, for the log; empty if there was none."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_held(self) -> bool:
        """True between `acquire` and `release`."""
        return self._thread is not None

    def acquire(self) -> None:
        """Take the lock and start its heartbeat; nothing if it is held already.

        Waits up to `stale_s` for the heartbeat of an owner on another host. Raises FolderInUseError
        if there is an owner.
        """
        if self.is_held:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.owner = Owner()
        for outer in self.folder.absolute().parents[:2]:
            self._check_outer(outer)
        while not self._create():
            self._take_over()
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()
        _HELD.append(self)
        end_by_exception_on_sigterm()

    def release(self) -> None:
        """Stop the heartbeat and remove the lock; nothing if it is not held."""
        if self._thread is None or self.owner.pid != os.getpid():
            return
        self._stop.set()
        self._thread.join(timeout=self.interval_s)
        self._thread = None
        _HELD.remove(self)
        if _owner_of(self.path) == self.owner:
            self.path.unlink(missing_ok=True)

    def _check_outer(self, folder: Path) -> None:
        """Raise FolderInUseError if another job owns the cascade that a stage's folder is in."""
        outer = RunLock(folder, interval_s=self.interval_s, stale_s=self.stale_s)
        owner = _owner_of(outer.path)
        if owner is not None and all(owner != lock.owner for lock in _HELD):
            outer._reason(owner)

    def _create(self) -> bool:
        """Create the lock file with this process as its owner; False if there is one already."""
        text = json.dumps(asdict(self.owner))
        draft = self.path.with_name(f".{NAME}-{self.owner.token}")
        with naming(draft):
            draft.write_text(text, encoding="utf-8")
        try:
            os.link(draft, self.path)
        except FileExistsError:
            # A network file system may repeat a request that has succeeded.
            return draft.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                raise
            return self._create_without_links(text)
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _create_without_links(self, text: str) -> bool:
        try:
            with naming(self.path), self.path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def _take_over(self) -> None:
        """Remove the lock of an owner that has ended. Raises FolderInUseError if it runs."""
        owner = _owner_of(self.path)
        reason = self._reason(owner)
        if reason is None:
            return  # it was released meanwhile
        aside = self.path.with_name(f".{NAME}-stale-{self.owner.token}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            if _owner_of(aside) == owner:
                self.note = f"{self.folder}: taken over from {_named(owner)}: {reason}"
            else:
                # Another job took the stale lock over first: its own lock goes back.
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink(missing_ok=True)

    def _reason(self, owner: Owner | None) -> str | None:
        """The reason why the owner's lock is stale; None if the lock is gone. Raises
        FolderInUseError if it is not stale."""
        if owner is not None:
            if owner.job and owner.job == self.owner.job and owner.restarts < self.owner.restarts:
                return "the job was requeued"
            alive = owner.is_alive(self.owner)
            if alive is False:
                return "the process has ended"
            if alive:
                raise self._error(owner)
        before = _heartbeat(self.path)
        deadline = time.monotonic() + self.stale_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.interval_s / 2))
            now = _heartbeat(self.path)
            if now is None:
                return None
            if now != before:
                raise self._error(owner or _owner_of(self.path))
        return f"no heartbeat for {self.stale_s:.0f} s"

    def _error(self, owner: Owner | None) -> FolderInUseError:
        return FolderInUseError(
            f"{self.folder} is in use by {_named(owner)}: wait for it or end it, or choose another "
            f"{self.option}"
        )

    def _beat(self) -> None:
        """Touch the lock file until the lock is released; end the process if another owns it."""
        while not self._stop.wait(self.interval_s):
            with contextlib.suppress(OSError):  # a file system that is unavailable for a while
                owner = _owner_of(self.path)
                if owner == self.owner or (owner is None and self._create()):
                    os.utime(self.path)
                elif owner is not None:
                    LOGGER.error(
                        "%s was taken over by %s while this process was silent: it ends now",
                        self.folder,
                        _named(owner),
                    )
                    os.kill(os.getpid(), signal.SIGTERM)
                    return


_HELD: list[RunLock] = []
"""Locks of this process, for the ends that unwind no context."""


def release_locks() -> None:
    """Release every lock of this process. Called before the process exits at once."""
    for lock in reversed(_HELD[:]):
        with contextlib.suppress(OSError):
            lock.release()


atexit.register(release_locks)


def end_by_exception_on_sigterm() -> None:
    """Let SIGTERM unwind the stack, so that contexts end and locks are released.

    A lock does so when it is acquired. A watchdog that starts before takes the signal for itself,
    and gives it back to what this installs first.
    """
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, _frame: FrameType | None) -> None:
    if not any(lock.owner.pid == os.getpid() for lock in _HELD):
        # A forked child, or a process whose run is over.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    raise SystemExit(128 + number)


def _owner_of(path: Path) -> Owner | None:
    """The owner that a lock file names; None if it is gone or names none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        owner = record_of(Owner, found)
    except (OSError, ValueError, RecursionError):
        return None
    # A missing field would be filled in with this process's own.
    return owner if owner.pid > 0 and len(found) == len(fields(Owner)) else None


def _heartbeat(path: Path) -> tuple[int, int] | None:
    """Identity and modification time of the lock file; None if it is gone.

    Opening the file makes a network file system ask its server instead of its cache.
    """
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_mtime_ns


def _named(owner: Owner | None) -> str:
    return "a job that its lock does not name" if owner is None else owner.text()


def _started_s(pid: int) -> float:
    """Start of a process in seconds since the boot: field 22 of /proc/PID/stat, see proc(5).

    Raises FileNotFoundError or ProcessLookupError if there is no such process.
    """
    text = Path(f"/proc/{pid}/stat").read_bytes()
    return int(text.rpartition(b")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


def _namespace() -> str:
    """Boot id and process namespace; empty parts where the kernel shows none."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
