"""Programs that try to escape, persist, exhaust resources, or read foreign data."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.sandbox import sandbox_or_skip

from nemocascade.recipe.envs import SandboxConfig
from nemocascade.sandbox import launch
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.types import Outcome, Program

CONFIG = {"time_s": 15.0, "workers": 1, "memory_mib": 256, "output_kib": 64, "scratch_mib": 4}
"""Time for every attack that ends by itself to do so on a busy machine."""
GRACE_S = 12.0
"""A program whose time is over has ended by then, even if it had to be repeated alone."""


@pytest.fixture(scope="module", params=["bubblewrap", "namespaces"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[SandboxPool]:
    made = sandbox_or_skip(SandboxConfig(isolation=request.param, **CONFIG))  # type: ignore[arg-type]
    yield made
    made.close()


@pytest.fixture(scope="module")
def hurried(sandbox: SandboxPool) -> Iterator[SandboxPool]:
    """The same isolation with a limit of one second, for attacks that only the limit ends."""
    made = SandboxPool(replace(sandbox.config, isolation=sandbox.isolation, time_s=1.0))  # type: ignore[arg-type]
    yield made
    made.close()


@pytest.fixture(autouse=True)
def still_works(sandbox: SandboxPool) -> Iterator[None]:
    """After every attack the same worker runs an honest program."""
    workers = sandbox.process_ids()
    yield
    assert sandbox.run(Program("print(6 * 7)")).stdout == "42\n"
    assert sandbox.process_ids() == workers, "an attack ended the worker"


def attack(sandbox: SandboxPool, source: str) -> Outcome:
    start = time.monotonic()
    outcome = sandbox.run(Program(source))
    assert time.monotonic() - start < sandbox.config.time_s + GRACE_S
    return outcome


def denied(sandbox: SandboxPool, source: str, *errors: str) -> None:
    """The last line of `source` must raise one of `errors`; lines before must work."""
    *lines, last = source.strip().splitlines()
    head = "\n".join(lines)
    outcome = attack(sandbox, f"{head}\nprint('tried', flush=True)\n{last}\nprint('reached')")
    assert outcome.stdout == "tried\n", (outcome.stdout, outcome.stderr)
    assert any(error in outcome.stderr for error in errors), outcome.stderr


def test_infinite_loop(hurried: SandboxPool) -> None:
    outcome = attack(hurried, "while True: pass")
    assert outcome.status == "time"


def test_sleep(hurried: SandboxPool) -> None:
    outcome = attack(hurried, "import time; print('a', flush=True); time.sleep(1000)")
    assert (outcome.status, outcome.stdout) == ("time", "a\n")


def test_signals_and_alarms_do_not_extend_the_time(hurried: SandboxPool) -> None:
    source = """
import signal
for s in range(1, 64):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
"""
    assert attack(hurried, source).status == "time"


def test_fork_bomb(hurried: SandboxPool) -> None:
    source = """
import os
made = 0
while made < 1000:
    try:
        if os.fork() == 0:
            while True: pass
        made += 1
    except OSError:
        break
print(made, flush=True)
while True: os.fork()
"""
    outcome = attack(hurried, source)
    assert int(outcome.stdout.split()[0]) < hurried.config.processes
    assert outcome.status in ("time", "failed")


def test_ten_gigabytes_of_memory(sandbox: SandboxPool) -> None:
    outcome = attack(sandbox, "x = bytearray(10 << 30)")
    assert outcome.status == "failed"
    assert "MemoryError" in outcome.stderr


def test_memory_taken_in_small_pieces(sandbox: SandboxPool) -> None:
    outcome = attack(sandbox, "x = []\nwhile True: x.append(bytearray(1 << 20))")
    assert outcome.status == "failed"
    assert "MemoryError" in outcome.stderr


def test_ten_gigabytes_of_output(sandbox: SandboxPool) -> None:
    outcome = attack(
        sandbox, "import os\nline = b'x' * 65536\nfor _ in range(163840): os.write(1, line)"
    )
    assert outcome.status == "output"
    assert len(outcome.stdout) == 64 << 10


def test_ten_gigabytes_on_the_result_pipe(sandbox: SandboxPool) -> None:
    outcome = attack(sandbox, "import os\nwhile True: os.write(3, b'7\\n' * 4096)")
    assert outcome.status == "output"


def test_a_full_scratch_folder(sandbox: SandboxPool) -> None:
    source = """
import os
print(os.getcwd(), os.listdir('.'))
try:
    for i in range(100):
        with open(str(i), 'wb') as f: f.write(bytes(1 << 20))
except OSError as e:
    print(i, e.strerror)
"""
    lines = attack(sandbox, source).stdout.splitlines()
    assert lines[0] == "/scratch []"
    assert lines[1].startswith(("3 ", "4 "))
    # What one program wrote, the next does not find.
    assert attack(sandbox, "import os; print(os.listdir('.'))").stdout == "[]\n"


@pytest.mark.parametrize(
    "arguments", ["", "socket.AF_INET, socket.SOCK_DGRAM", "socket.AF_UNIX", "socket.AF_NETLINK, 3"]
)
def test_sockets(sandbox: SandboxPool, arguments: str) -> None:
    denied(sandbox, f"import socket\nsocket.socket({arguments})", "PermissionError")


def test_reading_files_of_the_host(sandbox: SandboxPool, tmp_path: Path) -> None:
    secret = tmp_path / "checkpoint"
    secret.write_text("weights")
    denied(sandbox, f"open({str(secret)!r}).read()", "FileNotFoundError")
    denied(sandbox, f"open({os.path.abspath(__file__)!r}).read()", "FileNotFoundError")
    for path in ("/etc/passwd", "/proc/self/environ", "/dev/mem"):
        denied(sandbox, f"open({path!r}, 'rb')", "FileNotFoundError", "PermissionError")


def test_the_root_holds_nothing_else(sandbox: SandboxPool) -> None:
    """The interpreter and the system's libraries; what was mounted over is detached."""
    visible = {path.split("/")[1] for path in launch.visible()}
    found = attack(sandbox, "import os; print(*os.listdir('/'))").stdout.split()
    assert set(found) - {"worker"} == visible | {"dev", "proc", "scratch"}


def test_writing_outside_of_scratch(sandbox: SandboxPool) -> None:
    source = """
import os
bad = []
for folder in ('/', '/usr', '/lib', '/dev', '/proc', os.path.dirname(os.__file__)):
    try:
        open(folder + '/x', 'w')
        bad.append(folder)
    except OSError:
        pass
print(bad)
"""
    assert attack(sandbox, source).stdout == "[]\n"


def test_environment_variables(sandbox: SandboxPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    other = SandboxPool(replace(sandbox.config, isolation=sandbox.isolation))  # type: ignore[arg-type]
    found = other.run(Program("import os; print(*sorted(os.environ))")).stdout.split()
    other.close()
    assert "SECRET_TOKEN" not in found
    assert "PYTHONHASHSEED" in found


def test_symbolic_links(sandbox: SandboxPool, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("weights")
    for target in (str(secret), "../" * 20 + str(secret)):
        denied(
            sandbox,
            f"import os\nos.symlink({target!r}, 'link')\nopen('link').read()",
            "FileNotFoundError",
        )
    denied(sandbox, "import os\nos.link('/usr/bin/env', 'x')", "OSError", "PermissionError")


def test_proc_is_hidden(sandbox: SandboxPool) -> None:
    denied(sandbox, "import os\nos.listdir('/proc')", "PermissionError")
    for path in ("/proc/1/environ", "/proc/self/mem", "/proc/1/root/etc/passwd"):
        denied(sandbox, f"open({path!r}, 'rb')", "PermissionError", "FileNotFoundError")


@pytest.mark.parametrize(
    "call",
    [
        "ptrace(0, 0, 0, 0)",
        "ptrace(16, 1, 0, 0)",
        "unshare(0x10000000)",
        "mount(b'x', b'/scratch', b'tmpfs', 0, 0)",
        "umount2(b'/proc', 2)",
        "setns(0, 0)",
        "memfd_create(b'x', 0)",
        "shmget(0, 4096, 0o1600)",
        "prctl(1, 0)",
        "personality(0)",
        "setuid(0)",
        "chroot(b'.')",
        "syscall(310, 1, 0, 0, 0, 0, 0)",  # process_vm_readv
        "syscall(425, 1, 0)",  # io_uring_setup
        "syscall(321, 0, 0, 0)",  # bpf
        "syscall(250, 0, 0)",  # keyctl
    ],
)
def test_system_calls_that_no_program_needs(sandbox: SandboxPool, call: str) -> None:
    source = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.{call}, ctypes.get_errno())
"""
    assert attack(sandbox, source).stdout == "-1 1\n"  # EPERM


def test_a_clone_with_new_namespaces(sandbox: SandboxPool) -> None:
    number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    source = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall({number}, 0x10000011, 0, 0, 0, 0), ctypes.get_errno())
"""
    assert attack(sandbox, source).stdout == "-1 1\n"


STARTED = {
    "socket": ("import socket\nsocket.socket()", "PermissionError"),
    "user": ("import os\nos.setuid(0)", "PermissionError"),
    "files": ("print(open('/etc/passwd').read())", "FileNotFoundError"),
    "write": ("open('/usr/x', 'w')", "Read-only file system"),
    "namespaces": ("import os\nos.unshare(os.CLONE_NEWUSER)", "PermissionError"),
    "memory": ("x = bytearray(1 << 40)", "MemoryError"),
}


@pytest.mark.parametrize("name", STARTED)
def test_a_program_that_is_started_has_the_same_isolation(sandbox: SandboxPool, name: str) -> None:
    source, error = STARTED[name]
    outcome = attack(
        sandbox,
        "import subprocess, sys\n"
        f"p = subprocess.run([sys.executable, '-c', {source!r}], capture_output=True, text=True)\n"
        "print(p.returncode != 0, p.stdout, p.stderr.splitlines()[-1])",
    )
    assert outcome.stdout.startswith("True  "), outcome.stdout
    assert error in outcome.stdout


def test_a_program_that_is_started_gets_no_rights_and_no_secrets(sandbox: SandboxPool) -> None:
    """Neither by set-uid programs nor in its environment or its descriptors."""
    source = "import os\nos.execv('/usr/bin/env', ['env'])"
    names = {line.partition("=")[0] for line in attack(sandbox, source).stdout.splitlines()}
    known = {"PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "LANG", "PYTHONUTF8", "PYTHONHASHSEED"}
    # bubblewrap 0.8 sets PWD to the folder within.
    assert names <= known | {"LC_CTYPE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PWD"}
    source = (
        "import subprocess\nprint(subprocess.run(['/bin/su', '-c', 'id'], input=b'').returncode)"
    )
    assert attack(sandbox, source).stdout != "0\n"
    source = """
import subprocess, sys
code = "import os\\nfor n in range(3, 300):\\n  try: os.fstat(n); print(n)\\n  except OSError: pass"
print(subprocess.check_output([sys.executable, '-c', code], close_fds=False).split())
"""
    assert attack(sandbox, source).stdout == "[]\n"


def test_started_programs_end_with_their_program(hurried: SandboxPool) -> None:
    source = "import subprocess\nsubprocess.Popen(['sleep', '600'])\nprint('left')"
    assert attack(hurried, source).stdout == "left\n"
    source = "import subprocess\nsubprocess.run(['sh', '-c', 'while :; do :; done'])"
    assert attack(hurried, source).status == "time"


@pytest.mark.parametrize("target", ["0", "-1", "os.getppid()", "1", "2"])
def test_signals_to_others(sandbox: SandboxPool, target: str) -> None:
    """The program is process 1 of its namespace: whom it can signal is itself and its children."""
    source = f"""
import os, signal
print(os.getpid(), os.getppid(), flush=True)
try: os.kill({target}, signal.SIGKILL)
except OSError as e: print(e.strerror)
"""
    outcome = attack(sandbox, source)
    assert outcome.stdout.startswith("1 0\n")


def test_a_thread_that_outlives_the_program(sandbox: SandboxPool, hurried: SandboxPool) -> None:
    source = """
import os, threading, time
def stay():
    while True: time.sleep(0.01)
threading.Thread(target=stay, daemon=True).start()
print('end')
"""
    outcome = attack(sandbox, source)
    assert (outcome.status, outcome.stdout) == ("ok", "end\n")
    waiting = source.replace(", daemon=True", "")
    assert attack(hurried, waiting).status == "time"


def test_a_process_that_outlives_the_program(sandbox: SandboxPool) -> None:
    source = """
import os, time
if os.fork() == 0:
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
print('end')
"""
    outcome = attack(sandbox, source)
    assert (outcome.status, outcome.stdout) == ("ok", "end\n")
    assert outcome.wall_s < sandbox.config.time_s, "it is not waited for"


def test_more_threads_than_allowed(sandbox: SandboxPool) -> None:
    source = """
import threading, time
try:
    for i in range(1000):
        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
except RuntimeError:
    print(i)
"""
    assert int(attack(sandbox, source).stdout) < sandbox.config.processes


def test_the_worker_holds_nothing_of_other_programs(sandbox: SandboxPool) -> None:
    """A program searches the memory that it was forked with for another's source and output."""
    marker = "needle-" + "0123456789abcdef"
    assert attack(sandbox, f"print('{marker}')").stdout == f"{marker}\n"
    source = """
import gc, sys
marker = 'needle-' + '0123456789' + 'abcdef'
found = 0
gc.unfreeze()
for o in gc.get_objects():
    for part in (o.values() if type(o) is dict else o if type(o) in (list, tuple) else ()):
        if type(part) in (str, bytes) and part is not marker:
            text = part if type(part) is str else part.decode('latin-1')
            found += text == marker or "print('" + marker in text
print(found)
"""
    assert attack(sandbox, source).stdout == "0\n"


def test_file_descriptors_of_the_worker(sandbox: SandboxPool) -> None:
    source = """
import os
found = []
for n in range(1024):
    try: os.fstat(n); found.append(n)
    except OSError: pass
print(found)
"""
    assert attack(sandbox, source).stdout in ("[0, 1, 2, 3]\n", "[0, 1, 2, 3, 4]\n")


def test_limits_cannot_be_raised(sandbox: SandboxPool) -> None:
    for name in ("AS", "NPROC", "CPU", "FSIZE", "NOFILE"):
        kind = f"resource.RLIMIT_{name}"
        denied(
            sandbox,
            f"import resource\nresource.setrlimit({kind}, (-1, -1))",
            "ValueError",
            "PermissionError",
        )


def test_a_program_that_closes_everything(sandbox: SandboxPool) -> None:
    outcome = attack(
        sandbox, "import os\nfor n in range(64):\n  try: os.close(n)\n  except OSError: pass"
    )
    assert outcome.stdout == ""


@pytest.mark.parametrize(
    "source",
    ["import os; os.abort()", "import ctypes; ctypes.string_at(0)", "import os; os._exit(3)"],
)
def test_a_crash(sandbox: SandboxPool, source: str) -> None:
    assert attack(sandbox, source).status == "failed"


@pytest.mark.parametrize("source", ["(" * 10000, "\0", "def f(:", "x = 1" + "+1" * 50000])
def test_source_that_breaks_the_compiler(sandbox: SandboxPool, source: str) -> None:
    assert attack(sandbox, source).status == "failed"
