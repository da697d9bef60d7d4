"""A worker: an isolated interpreter that forks a child for each program or session.

Forking a warm interpreter takes about a millisecond, starting one twenty. The worker holds no data
of any program. Sources, inputs and outputs go through pipes between the trusted side and the child,
so a program that searches the memory it was forked with finds nothing of others.
"""

from __future__ import annotations

import fcntl
import gc
import json
import math
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NoReturn

from . import accounting, harness, isolation, linux, seccomp

CHANNEL_FD = 200
"""File descriptor of the worker's socket, above those of a program."""
FDS = 5
"""File descriptors passed with a program: stdin, stdout, stderr, results, job."""
POLL_S = 0.05
"""Interval of reading a program's CPU time."""
IDLE_POLL_S = 1.0
"""The same for a session without a running cell."""
PATIENCE = 4.0
"""Longest waits for a CPU that a cell's wall-clock limit excludes, in units of that limit."""
GRACE_S = 1.0
"""A cell that still runs this long after it was interrupted ends its session."""

Watch = Callable[[int], tuple[str, float]]
"""Waits for a program. Returns which limit it exceeded ("cpu", "wall" or ""), and for the
wall-clock limit the seconds that it waited for a CPU."""

# Imported once here instead of in every program.
PRELOADED = (
    *("bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions"),
    *("functools", "heapq", "itertools", "math", "operator", "random", "re", "statistics"),
    *("hashlib", "string", "threading", "traceback", "typing", "unittest"),
)


def main(settings_text: str) -> None:
    """Set up the isolation in the settings, then serve programs until the socket closes."""
    settings = json.loads(settings_text)
    os.dup2(0, CHANNEL_FD)
    os.set_inheritable(CHANNEL_FD, False)
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    channel = socket.socket(fileno=CHANNEL_FD)
    try:
        _settle(settings)
    except (OSError, KeyError) as error:
        channel.send(json.dumps({"unavailable": f"{type(error).__name__}: {error}"}).encode())
        return
    channel.send(json.dumps({"ready": True}).encode())
    while True:
        message, fds, _, _ = socket.recv_fds(channel, 64, FDS)
        if not message:
            return
        order, _, value = message.partition(b" ")
        # Other orders are for a session that has just ended by itself.
        if order == b"run" and len(fds) == FDS:
            watch = partial(_wait, channel, settings, deadline=time.monotonic() + float(value))
        elif order == b"serve" and len(fds) == FDS:
            watch = partial(_attend, channel, settings)
        else:
            continue
        cells = int(value) if order == b"serve" else 0
        answer = _supervise(fds, {**settings, "cells": cells}, watch)
        channel.send(json.dumps(answer).encode())


def _settle(settings: dict[str, Any]) -> None:
    sys.path += settings["packages"]
    for name in (*PRELOADED, *settings["modules"]):
        __import__(name)
    import site

    # Interactive interpreters have `exit` and `quit`; -S disables them.
    site.setquit()
    if settings["isolation"] == "namespaces":
        isolation.enter(settings["visible"], settings["hidden"])
    if settings["isolation"] != "none":
        isolation.become_nobody()
        _filter(executes=True)
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    gc.collect()
    gc.freeze()


@cache
def _filter(*, executes: bool) -> linux.SeccompFilter:
    """Return the filter of programs; an isolated worker makes it before the first fork. Raises
    KeyError."""
    return linux.SeccompFilter(seccomp.program(linux.MACHINE, executes=executes))


def _supervise(fds: list[int], settings: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """Run one program until it ends, exceeds its time limit, or is to be killed.

    settings: `cells` is the largest number of cells of a session; 0 for a program.
    """
    started = time.monotonic()
    if settings["isolation"] == "none":
        # No mount namespace removes the program's folder when it ends.
        settings = {**settings, "scratch": tempfile.mkdtemp(dir=settings["scratch"])}
    told, tell = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        _launch(fds, tell, settings)
    for fd in (*fds, tell):
        os.close(fd)
    with os.fdopen(told) as reader:
        text = reader.read()
    os.waitpid(launcher, 0)
    if not text.isdigit():
        if settings["isolation"] == "none":
            shutil.rmtree(settings["scratch"], ignore_errors=True)
        return {"unavailable": text or "the child that isolates a program died"}
    program = int(text)
    over_time, waited_s = watch(program)
    _, status, usage = os.wait4(program, 0)
    if settings["isolation"] == "none":
        _end_orphans()
        shutil.rmtree(settings["scratch"], ignore_errors=True)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "over_time": over_time,
        "waited_s": waited_s,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "wall_s": time.monotonic() - started,
    }


def _wait(
    channel: socket.socket, settings: dict[str, Any], program: int, deadline: float
) -> tuple[str, float]:
    """Wait for the program; kill it on demand, at the deadline, or over its CPU time.

    Returns which limit it exceeded ("cpu", "wall" or ""), and for the wall-clock limit the seconds
    that it waited for a CPU.
    """
    watched = os.pidfd_open(program)
    over_time, waited_s = "", 0.0
    try:
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        poll.register(channel, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(1000 * POLL_S)}
            if watched in ready:
                return over_time, waited_s
            if channel.fileno() in ready:
                order = channel.recv(64)
                os.kill(program, signal.SIGKILL)
                if not order:  # the trusted side has closed the socket
                    os._exit(0)
                poll.unregister(channel)
            elif not over_time:
                used_s, waits_s = accounting.usage()
                if used_s >= settings["time_s"]:
                    over_time = "cpu"
                elif time.monotonic() >= deadline:
                    over_time, waited_s = "wall", waits_s
                if over_time:
                    os.kill(program, signal.SIGKILL)
    finally:
        os.close(watched)


def _attend(channel: socket.socket, settings: dict[str, Any], program: int) -> tuple[str, float]:
    """Wait for a session's program while it runs cells, one at a time. Returns as `_wait`.

    The order `cell W` starts the limits of a cell: CPU time, and W seconds of wall-clock time
    without its waits for a CPU. `rest` ends them; the CPU time is limited between cells too. A cell
    over a limit is interrupted, and if it still runs, the session is killed. `kill` ends the
    session.
    """
    watched = os.pidfd_open(program)
    over, kill_at = ("", 0.0), math.inf
    started, wall_s = 0.0, math.inf
    before = (0.0, 0.0)
    try:
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        poll.register(channel, select.POLLIN)
        while True:
            poll_s = IDLE_POLL_S if wall_s == math.inf else POLL_S
            ready = {fd for fd, _ in poll.poll(1000 * poll_s)}
            if watched in ready:
                return over
            now = time.monotonic()
            if channel.fileno() in ready:
                order, _, value = channel.recv(64).partition(b" ")
                if order in (b"cell", b"rest"):
                    wall_s = float(value or "inf")
                    over, kill_at, started, before = ("", 0.0), math.inf, now, accounting.usage()
                    continue
                os.kill(program, signal.SIGKILL)
                if not order:  # the trusted side has closed the socket
                    os._exit(0)
            elif now >= kill_at:
                os.kill(program, signal.SIGKILL)
            elif not over[0]:
                used_s, waits_s = accounting.usage()
                waits_s = waits_s - before[1] if math.isfinite(waits_s) else math.inf
                if used_s - before[0] >= settings["time_s"]:
                    over = "cpu", 0.0
                elif now - started - min(waits_s, PATIENCE * wall_s) >= wall_s:
                    over = "wall", waits_s
                if over[0]:
                    # A cell that got no CPU is not at fault: it is not told that it was slow.
                    is_slow = wall_s < math.inf and over[1] < PATIENCE * wall_s
                    os.kill(program, signal.SIGINT if is_slow else signal.SIGKILL)
                    kill_at = now + GRACE_S
    finally:
        os.close(watched)


def _end_orphans() -> None:
    """Kill a program's orphans, which become our children without a process namespace."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            children = [int(text) for text in file.read().split()]
        if not children:
            return
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _launch(fds: list[int], tell: int, settings: dict[str, Any]) -> NoReturn:
    """Run the first child: make namespaces, fork the program into them, send its id, and exit."""
    try:
        os.setsid()
        linux.write_file("/proc/self/oom_score_adj", "1000")
        if settings["isolation"] != "none":
            isolation.enter_user_namespace(os.geteuid(), os.getegid(), linux.PROGRAM_NAMESPACES)
            isolation.hide_and_make_scratch(settings["scratch_mib"], settings["scratch_entries"])
        program = os.fork()
        if program == 0:
            _become_program(fds, settings)
        os.write(tell, str(program).encode())
    except BaseException as error:
        os.write(tell, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(0)


def _become_program(fds: list[int], settings: dict[str, Any]) -> NoReturn:
    """Run the second child: close descriptors, set limits, drop privileges, and run."""
    status = 125
    try:
        # Own session: a signal to its process group reaches nobody else.
        os.setsid()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, CHANNEL_FD + 10) for fd in fds]
        for number, fd in enumerate(high):
            os.dup2(fd, number, inheritable=number <= 2)
        os.closerange(FDS, 1 << 16)
        os.chdir(settings["scratch"])
        _set_limits(settings)
        _give_up_rights(settings["isolation"])
        status = harness.serve() if settings["cells"] else harness.run()
    except BaseException as error:
        os.write(2, f"sandbox: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def _set_limits(settings: dict[str, Any]) -> None:
    cpu = int(settings["time_s"] * max(1, settings["cells"])) + 1
    limits = {
        resource.RLIMIT_AS: settings["memory_mib"] << 20,
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: settings["scratch_mib"] << 20,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: settings["processes"],
    }
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (bound, bound))


def _give_up_rights(kind: str) -> None:
    if kind != "none":
        linux.drop_capabilities()
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    try:
        # Without isolation, other programs of the host would run with the user's files.
        linux.set_seccomp_filter(_filter(executes=kind != "none"))
    except (OSError, KeyError):
        # Without isolation, the filter is optional.
        if kind != "none":
            raise
