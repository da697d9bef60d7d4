"""Starts an isolated worker, by bubblewrap or by direct system calls."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from nemocascade.recipe.envs import SandboxConfig

Isolation = Literal["bubblewrap", "namespaces", "none"]

_HERE = Path(__file__).resolve().parent
_INSIDE = "/worker"
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from inside import zygote; sys.path.pop(0); "
    "zygote.main(sys.argv[2])"
)
_CREDENTIALS = struct.Struct("iII")
"""struct ucred: process, user, group."""
_SCRATCH = "/scratch"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


class IsolationError(RuntimeError):
    """An isolation backend is unavailable on this host; the message says what was denied."""


def missing(isolation: Isolation) -> str | None:
    """Return why an isolation backend cannot even be tried; None if it can."""
    if sys.platform != "linux":
        return f"the sandbox needs Linux, this is {sys.platform}"
    if isolation == "bubblewrap" and _bwrap() is None:
        return "bwrap is not installed"
    return None


@cache
def _bwrap() -> str | None:
    """Absolute path of bubblewrap on this process's PATH, which the worker does not have."""
    found = shutil.which("bwrap")
    return None if found is None else os.path.abspath(found)


def installed(modules: Sequence[str]) -> dict[str, str]:
    """Return the folder of each installed module. Raises ValueError for one that is missing."""
    found = {}
    for name in modules:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"programs shall import {name}, which is not installed: install it")
        found[name] = os.path.realpath(spec.submodule_search_locations[0])
    return found


def start(
    isolation: Isolation, config: SandboxConfig, scratch: str | None, modules: Mapping[str, str]
) -> Worker:
    """Start a worker. Raises IsolationError if the host does not permit the isolation backend.

    scratch: the folder that programs write to without isolation. modules: the folder of each
    further module that programs may import, see `installed`.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # The libraries of a wheel are in a folder beside the module.
    folders = [path for folder in modules.values() for path in (folder, f"{folder}.libs")]
    folders = [path for path in folders if os.path.isdir(path)]
    packages = [os.path.realpath(path) for path in config.packages]
    shown = visible([*packages, *folders])
    folder = scratch or _SCRATCH
    settings = {
        "isolation": isolation,
        "visible": shown,
        "scratch": folder,
        "time_s": config.time_s,
        "memory_mib": config.memory_mib,
        "processes": config.processes,
        "scratch_mib": config.scratch_mib,
        "scratch_entries": config.scratch_entries,
        "packages": list(dict.fromkeys([*packages, *map(os.path.dirname, modules.values())])),
        "modules": list(modules),
    }
    code = _INSIDE if isolation == "bubblewrap" else str(_HERE)
    hidden = hidden_packages(shown, [*packages, *folders])
    settings["hidden"] = hidden
    python = [_python(), "-s", "-P", "-S", "-B", "-c", _START, code, json.dumps(settings)]
    command = _bubblewrap(shown, hidden) + python if isolation == "bubblewrap" else python
    with theirs, _explained(command[0]):
        process = subprocess.Popen(
            command,
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # Programs see the worker's environment, so it is built from scratch.
            env={
                "PATH": "/usr/bin:/bin",
                "LD_LIBRARY_PATH": f"{sys.base_exec_prefix}/lib",
                "HOME": folder,
                "TMPDIR": folder,
                "LANG": "C.UTF-8",
                "PYTHONUTF8": "1",
                "PYTHONHASHSEED": "0",
                # A thread for each core of the host would exceed `processes`.
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
            cwd="/",
            start_new_session=True,
        )
    return Worker(process, ours)


@contextlib.contextmanager
def _explained(program: str) -> Iterator[None]:
    """Raise IsolationError for a program that cannot be executed."""
    try:
        yield
    except OSError as error:
        raise IsolationError(f"{program} cannot be started: {error.strerror}") from error


class Worker:
    """A started worker process and the socket to it. `pid` is the isolated worker's own.

    Raises IsolationError if it failed to start.
    """

    START_TIMEOUT_S = 60.0

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self.process = process
        self.channel = channel
        self.pid = process.pid
        self._inner: int | None = None
        channel.settimeout(self.START_TIMEOUT_S)
        answer = self._hello()
        if "ready" not in answer:
            self.kill()
            assert process.stderr is not None
            said = process.stderr.read().decode(errors="replace").strip().splitlines()
            process.stderr.close()
            reason = answer.get("unavailable") or (said[-1] if said else "the worker did not start")
            raise IsolationError(str(reason))
        assert process.stderr is not None
        process.stderr.close()

    def kill(self) -> None:
        """Kill the worker and everything in it, and reap it."""
        self.channel.close()
        if self._inner is not None:
            # All programs die with process 1 of their worker's namespace.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._inner, signal.SIGKILL)
            os.close(self._inner)
            self._inner = None
        self.process.kill()
        self.process.wait()

    def _hello(self) -> dict[str, Any]:
        """Receive the first message. With it, the kernel sends the sender's pid, as seen from here.

        The started process is only the outermost: bubblewrap, or the guard.
        """
        ancillary_bytes = socket.CMSG_SPACE(_CREDENTIALS.size)
        self.channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        try:
            first, ancillary, _, _ = self.channel.recvmsg(1 << 16, ancillary_bytes)
        except (TimeoutError, ConnectionError):
            return {}
        finally:
            self.channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        if not first:
            return {}
        for _, kind, data in ancillary:
            sender = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0]
            # A worker that could not start may have ended: then its id is 0, or belongs to nobody.
            if kind == socket.SCM_CREDENTIALS and sender:
                self.pid = sender
                with contextlib.suppress(ProcessLookupError):
                    self._inner = os.pidfd_open(sender)
        return dict(json.loads(first))


def _python() -> str:
    """Path of the interpreter itself, not of a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def visible(packages: Sequence[str] = ()) -> list[str]:
    """Paths that programs can read: interpreter, system libraries, and folders of `packages`.

    Without `packages`, no site-packages.
    """
    prefixes = {sys.base_prefix, sys.base_exec_prefix, str(Path(_python()).parent.parent)}
    wanted = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", *sorted(prefixes), *packages]
    shown: list[str] = []
    for path in wanted:
        inside = any(path == p or path.startswith(p + "/") for p in shown)
        if os.path.exists(path) and path != "/" and not inside:
            shown.append(path)
    return shown


def hidden_packages(shown: Sequence[str], packages: Sequence[str]) -> list[str]:
    """Return the host's folders of installed packages below the `shown` paths.

    Programs find them empty, except those of `packages`, those in one, and those that hold one.
    """
    patterns = ("lib*/python*/site-packages", "lib*/python*/dist-packages")
    roots = dict.fromkeys(p for path in shown for p in (path, f"{path}/local"))
    found = {
        str(folder)
        for root in roots
        for pattern in patterns
        for folder in Path(root).glob(pattern)
        if folder.is_dir() and not folder.is_symlink()
    }
    near = [(f"{folder}/", f"{path}/") for folder in found for path in packages]
    used = {folder for folder, path in near if folder.startswith(path) or path.startswith(folder)}
    return sorted(folder for folder in found if f"{folder}/" not in used)


def _bubblewrap(visible: list[str], hidden: list[str]) -> list[str]:
    bwrap = _bwrap()
    if bwrap is None:
        raise IsolationError("bwrap is not installed")
    command = [bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--as-pid-1"]
    if os.geteuid() == 0:
        # The kernel does not count root's processes, so the worker must be able to become nobody.
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            command += ["--cap-add", capability]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    for path in visible:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            # bwrap creates missing parents with owner-only access; the worker will be another user.
            for parent in reversed(Path(path).parents[:-1]):
                command += ["--perms", "0755", "--dir", str(parent)]
            command += ["--ro-bind", path, path]
    for path in hidden:
        command += ["--perms", "0555", "--tmpfs", path, "--remount-ro", path]
    for folder in ("/dev", _INSIDE):
        command += ["--perms", "0755", "--dir", folder]
    command += ["--ro-bind", str(_HERE / "inside"), f"{_INSIDE}/inside"]
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    # POSIX semaphores and shared memory are files there.
    command += ["--symlink", _SCRATCH, "/dev/shm"]
    # Only the worker sees /proc, to map users for its children; programs get an empty folder.
    command += ["--dev-bind", "/proc", "/proc", "--dir", _SCRATCH, "--remount-ro", "/"]
    return [*command, "--chdir", "/", "--"]
