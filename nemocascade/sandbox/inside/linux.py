"""System calls missing in Python 3.12, by ctypes."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Sequence

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
PROGRAM_NAMESPACES = CLONE_NEWNS | CLONE_NEWPID
"""Those of a program in its worker's. The worker's host name, network and IPC are empty, and the
seccomp filter lets no program leave anything there: it denies sockets, queues and shared memory.
To make and remove one of each kind would take an eighth of a short program's time."""

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
CAPABILITIES = 64
"""Capability numbers tried when capabilities are dropped; the kernel has fewer."""

MACHINE = platform.machine()
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION = 0x20080522
_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_READ_ONLY_NO_SUID_NO_DEVICES = 0x1 | 0x2 | 0x4

_libc = ctypes.CDLL(None, use_errno=True)

# Made once: a forked child that makes or changes an object copies its page.
_CAPABILITY_HEADER = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
_NO_CAPABILITIES = (ctypes.c_uint32 * 6)()
_ZERO = ctypes.c_ulong(0)


class SeccompFilter(ctypes.Structure):
    """A classic BPF program as the kernel takes it: `struct sock_fprog`."""

    _fields_ = (("size", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    def __init__(self, instructions: Sequence[tuple[int, int, int, int]]) -> None:
        """instructions: `(code, jump if true, jump if false, k)`."""
        raw = b"".join(
            code.to_bytes(2, sys.byteorder) + bytes((jt, jf)) + k.to_bytes(4, sys.byteorder)
            for code, jt, jf, k in instructions
        )
        self._buffer = ctypes.create_string_buffer(raw, len(raw))
        super().__init__(len(instructions), ctypes.addressof(self._buffer))


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def write_file(path: str, text: str) -> None:
    """Write a file of /proc without Python's file objects. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def unshare(flags: int) -> None:
    """Move to new namespaces of the kinds in `flags`. Raises OSError."""
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """Call mount(2). Raises OSError."""
    _check(
        _libc.mount(
            source.encode(),
            target.encode(),
            kind.encode() if kind else None,
            ctypes.c_ulong(flags),
            data.encode(),
        ),
        f"mount {kind or ''} on {target}",
    )


def make_read_only(target: str, *, recursive: bool) -> None:
    """Make mounts at (and below) `target` read-only, without set-uid programs and devices.

    Raises OSError, also because kernels before 5.12 do not have the call.
    """
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_NO_SUID_NO_DEVICES, 0, 0, 0)
    _check(
        _libc.syscall(
            ctypes.c_long(_MOUNT_SETATTR),
            ctypes.c_int(_AT_FDCWD),
            target.encode(),
            ctypes.c_uint(_AT_RECURSIVE if recursive else 0),
            attributes,
            ctypes.c_size_t(ctypes.sizeof(attributes)),
        ),
        f"make {target} read-only",
    )


def unmount(target: str) -> None:
    """Detach a mount. Raises OSError."""
    _check(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    """Call pivot_root(2). Raises OSError."""
    _check(
        _libc.syscall(ctypes.c_long(_PIVOT_ROOT[MACHINE]), new.encode(), old.encode()),
        "pivot_root",
    )


def prctl(option: int, argument: int = 0) -> None:
    """Call prctl(2) with one argument. Raises OSError."""
    _check(_prctl(option, argument), f"prctl({option}, {argument})")


def _prctl(option: int, argument: int) -> int:
    result: int = _libc.prctl(option, ctypes.c_ulong(argument), _ZERO, _ZERO, _ZERO)
    return result


def drop_capabilities() -> None:
    """Drop all capabilities permanently. Raises OSError."""
    number = 0
    # Fails beyond the kernel's last number, or if there are no capabilities to drop.
    while number < CAPABILITIES and _prctl(PR_CAPBSET_DROP, number) == 0:
        number += 1
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    call = ctypes.c_long(_CAPSET[MACHINE])
    _check(_libc.syscall(call, _CAPABILITY_HEADER, _NO_CAPABILITIES), "capset")


def set_seccomp_filter(program: SeccompFilter) -> None:
    """Install a filter on this thread. Requires PR_SET_NO_NEW_PRIVS. Raises OSError."""
    mode_filter = ctypes.c_ulong(2)
    result = _libc.prctl(PR_SET_SECCOMP, mode_filter, ctypes.byref(program), _ZERO, _ZERO)
    _check(result, "seccomp filter")
