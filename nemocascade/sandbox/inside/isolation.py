"""Isolation backend by direct system calls: namespaces and a nearly empty file system."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from . import linux

NOBODY = 65534
SCRATCH = "/scratch"
_EMPTY_FLAGS = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def enter(visible: Sequence[str], hidden: Sequence[str]) -> None:
    """Continue as process 1 of new namespaces whose file system holds `visible`, read-only.

    Folders of `hidden` below them are empty.

    The calling process stays outside as a guard: it waits, and the sandbox dies with it. Requires
    root, or a host that lets unprivileged users create user namespaces. Raises OSError.
    """
    if os.geteuid() == 0:
        linux.unshare(linux.NAMESPACES)
    else:
        enter_user_namespace(os.geteuid(), os.getegid(), linux.NAMESPACES)
    child = os.fork()
    if child:
        _guard(child)
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    _change_root(visible, hidden)


def become_nobody() -> None:
    """Drop root and all capabilities. Raises OSError."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    linux.drop_capabilities()
    # A change of user makes a process undumpable: it could not map users for its children.
    linux.prctl(linux.PR_SET_DUMPABLE, 1)
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)


def enter_user_namespace(user: int, group: int, kinds: int) -> None:
    """Create namespaces of these kinds, in which the outer `user` and `group` are nobody."""
    linux.unshare(linux.CLONE_NEWUSER | kinds)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {user} 1"),
        ("gid_map", f"{NOBODY} {group} 1"),
    ):
        linux.write_file(f"/proc/self/{name}", text)


def hide_and_make_scratch(scratch_mib: int, entries: int) -> None:
    """Mount an empty scratch folder and hide /proc, in a program's own mount namespace."""
    size = f"size={scratch_mib}m,nr_inodes={entries},mode=0700"
    linux.mount("scratch", SCRATCH, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, size)
    linux.mount("hidden", "/proc", "tmpfs", _EMPTY_FLAGS, "size=0,nr_inodes=1,mode=0000")


def _guard(child: int) -> None:
    """Wait for process 1 and exit with its status. Only /dev/null stays open."""
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.closerange(3, 1 << 16)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _change_root(visible: Sequence[str], hidden: Sequence[str]) -> None:
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    root = _mount_point(visible)
    linux.mount("root", root, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=0755")
    for path in visible:
        if os.path.islink(path):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(os.readlink(path), root + path)
        else:
            _bind(path, root + path)
            linux.make_read_only(root + path, recursive=True)
    empty = "size=0,nr_inodes=1,mode=0555"
    for path in hidden:
        linux.mount("hidden", root + path, "tmpfs", _EMPTY_FLAGS, empty)
    for path in (*DEVICES, "/proc"):
        # Bind the outer /proc, since containers may forbid mounting a new one. Only trusted code
        # sees it; programs get an empty folder in its place.
        _bind(path, root + path)
    # POSIX semaphores and shared memory are files there.
    os.symlink(SCRATCH, f"{root}/dev/shm")
    os.mkdir(root + SCRATCH)
    os.mkdir(root + "/old")
    os.chdir(root)
    linux.pivot_root(".", "old")
    os.chdir("/")
    linux.unmount("/old")
    os.rmdir("/old")
    linux.make_read_only("/", recursive=False)


def _mount_point(visible: Sequence[str]) -> str:
    """Return a folder to mount the new root on, which covers nothing that must stay visible."""
    for folder in ("/mnt", "/run", "/tmp", "/var"):
        if os.path.isdir(folder) and not any((p + "/").startswith(folder + "/") for p in visible):
            return folder
    raise OSError("no folder of /mnt, /run, /tmp, /var is free to build a file system on")


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb"):
            pass
    linux.mount(source, target, None, linux.MS_BIND | linux.MS_REC)
