"""Seccomp filter with a list of allowed system calls: others fail with EPERM (clone3: ENOSYS).

Allowed are the calls of a Python program without network: files, memory, threads, its own
processes, clocks, pipes and socket pairs; in isolation also execve, because programs that it starts
have the same isolation, rights and filter. Not allowed: sockets, ptrace, mount, namespaces, prctl,
System V shared memory, memfd, io_uring, bpf, keys.
"""

from __future__ import annotations

import errno

# name:number on x86_64:number on aarch64 ("-": that machine has no such call).
_ALLOWED = """
read:0:63 write:1:64 open:2:- openat:257:56 close:3:57 stat:4:- fstat:5:80
lstat:6:- newfstatat:262:79 statx:332:291 poll:7:- ppoll:271:73 lseek:8:62
mmap:9:222 msync:26:227 mprotect:10:226 munmap:11:215 brk:12:214 mremap:25:216 madvise:28:233
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136
rt_sigtimedwait:128:137 rt_sigsuspend:130:133 ioctl:16:29 pread64:17:67 pwrite64:18:68
readv:19:65 writev:20:66 access:21:- faccessat:269:48 faccessat2:439:439 pipe:22:- pipe2:293:59
select:23:- pselect6:270:72 sched_yield:24:124 sched_getaffinity:204:123 sched_getparam:143:121
sched_getscheduler:145:120 sched_get_priority_max:146:125 sched_get_priority_min:147:126
dup:32:23 dup2:33:- dup3:292:24 nanosleep:35:101 clock_nanosleep:230:115 getitimer:36:102
setitimer:38:103 alarm:37:- pause:34:- getpid:39:172 getppid:110:173 gettid:186:178
getpgid:121:155 getpgrp:111:- getsid:124:156 getuid:102:174 geteuid:107:175 getgid:104:176
getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158 fork:57:- vfork:58:-
exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95 kill:62:129 tgkill:234:131 tkill:200:130
uname:63:160 fcntl:72:25 flock:73:32 fsync:74:82 fdatasync:75:83 truncate:76:45 ftruncate:77:46
fallocate:285:47 getdents:78:- getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50
rename:82:- renameat:264:38 renameat2:316:276 mkdir:83:- mkdirat:258:34 rmdir:84:- link:86:-
linkat:265:37 unlink:87:- unlinkat:263:35 symlink:88:- symlinkat:266:36 readlink:89:-
readlinkat:267:78 chmod:90:- fchmod:91:52 fchmodat:268:53 umask:95:166 utimensat:280:88
gettimeofday:96:169 time:201:- getrlimit:97:163 prlimit64:302:261 getrusage:98:165
sysinfo:99:179 times:100:153 set_tid_address:218:96 set_robust_list:273:99
get_robust_list:274:100 futex:202:98 sigaltstack:131:132 arch_prctl:158:- clock_gettime:228:113
clock_getres:229:114 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:-
epoll_pwait:281:22 eventfd:284:- eventfd2:290:19 getrandom:318:278 rseq:334:293
membarrier:324:283 getpriority:140:141 sendfile:40:71 copy_file_range:326:285 socketpair:53:199
sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212 shutdown:48:210 setsockopt:54:208
getsockopt:55:209 creat:85:- statfs:137:43 fstatfs:138:44 getcpu:309:168 restart_syscall:219:128
setpgid:109:154 getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11
llistxattr:195:12 flistxattr:196:13
"""
_EXECVE = {"x86_64": 59, "aarch64": 221}
_CLONE = {"x86_64": (56, 435), "aarch64": (220, 435)}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NEW_NAMESPACES = 0x7E020000
"""All CLONE_NEW* flags of clone(2)."""

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in `struct seccomp_data`; both machines store the low half of an argument first."""


def numbers(machine: str) -> list[int]:
    """Numbers of the allowed calls on `machine`, except clone. Raises KeyError if unknown."""
    column = {"x86_64": 1, "aarch64": 2}[machine]
    rows = [entry.split(":") for entry in _ALLOWED.split()]
    return [int(row[column]) for row in rows if row[column] != "-"]


def program(machine: str, *, executes: bool) -> list[tuple[int, int, int, int]]:
    """Return the filter as classic BPF: (code, jump if true, jump if false, k). Raises KeyError.

    executes: allow execve.
    """
    clone, clone3 = _CLONE[machine]
    allowed = numbers(machine) + ([_EXECVE[machine]] if executes else [])
    deny = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    head = [
        (_LOAD, 0, 0, _ARCH),
        # Another architecture has other numbers: 32-bit calls would bypass the filter.
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        # A filter cannot read the flags of clone3; the C library falls back to clone.
        (_EQUAL, 0, 1, clone3),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        (_EQUAL, 0, 4, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 0, 1, _NEW_NAMESPACES),
        deny,
        (_RETURN, 0, 0, _ALLOW),
    ]
    tests = [(_EQUAL, len(allowed) - i, 0, number) for i, number in enumerate(allowed)]
    return [*head, *tests, deny, (_RETURN, 0, 0, _ALLOW)]
