"""Trusted side of the sandbox: outcomes, lost workers, hosts without isolation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from helpers.sandbox import sandbox_or_skip, wait_for_end

from nemocascade.recipe.envs import SandboxConfig
from nemocascade.sandbox import launch, pool
from nemocascade.sandbox.fair_slots import FairSlots
from nemocascade.sandbox.inside import seccomp
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.types import Outcome, Program, SandboxError, SandboxUnavailable


@pytest.fixture(scope="module")
def sandbox() -> Iterator[SandboxPool]:
    made = sandbox_or_skip(SandboxConfig(time_s=2.0, workers=2))
    yield made
    made.close()


def test_a_script(sandbox: SandboxPool) -> None:
    outcome = sandbox.run(Program("name = input()\nprint('hello', name)", stdin="you\n"))
    assert (outcome.status, outcome.exit_status) == ("ok", 0)
    assert (outcome.stdout, outcome.stderr) == ("hello you\n", "")


def test_a_script_is_main_and_can_exit(sandbox: SandboxPool) -> None:
    for leave, status in (("exit()", 0), ("exit(3)", 3), ("raise SystemExit('why')", 1)):
        outcome = sandbox.run(Program(f"if __name__ == '__main__':\n  print(1)\n  {leave}"))
        assert (outcome.stdout, outcome.exit_status) == ("1\n", status)


def test_an_exception_is_shown(sandbox: SandboxPool) -> None:
    outcome = sandbox.run(Program("print('a')\n1 / 0"))
    assert (outcome.status, outcome.exit_status, outcome.stdout) == ("failed", 1, "a\n")
    assert outcome.stderr.strip().endswith("ZeroDivisionError: division by zero")


def test_calls(sandbox: SandboxPool) -> None:
    source = "def f(x, y=1):\n  return (x + y, {y: [x]})"
    outcome = sandbox.run(Program(source, function="f", calls=([1], [2, 3])))
    assert outcome.results == ([2, {"1": [1]}], [5, {"3": [2]}])
    method = "class Solution:\n  def g(self, s):\n    return {c for c in s}"
    assert sandbox.run(Program(method, function="g", calls=(["ba"],))).results == (["a", "b"],)


def test_calls_up_to_the_first_that_fails(sandbox: SandboxPool) -> None:
    outcome = sandbox.run(
        Program("def f(x): return 6 // x", function="f", calls=([1], [2], [0], [3]))
    )
    assert (outcome.status, outcome.results) == ("failed", (6, 3))
    missing = sandbox.run(Program("x = 1", function="f", calls=([1],)))
    assert missing.status == "failed"
    assert "defines no f" in missing.stderr
    odd = sandbox.run(Program("def f(x): return f", function="f", calls=([1],)))
    assert "cannot be compared" in odd.stderr


def test_long_input_output_and_source(sandbox: SandboxPool) -> None:
    text = "x" * 500_000
    echoed = sandbox.run(Program("print(input())", stdin=text))
    assert echoed.stdout == text + "\n"
    # A program that reads nothing must not block whoever writes.
    assert sandbox.run(Program("print(1)", stdin=text)).stdout == "1\n"
    assert sandbox.run(Program(f"s = {text!r}\nprint(len(s))")).stdout == "500000\n"


def test_files_lie_in_the_folder_of_the_program(sandbox: SandboxPool) -> None:
    files = {"a/b/c.bin": bytes(range(256)), "helper.py": b"VALUE = 7\n"}
    source = (
        "import os, sys\nsys.path.insert(0, os.getcwd())\nimport helper\n"
        "print(helper.VALUE, open('a/b/c.bin', 'rb').read() == bytes(range(256)))"
    )
    assert sandbox.run(Program(source, files=files)).stdout == "7 True\n"
    assert sandbox.run(Program("import os; print(os.listdir('.'))")).stdout == "[]\n"


def test_threads_share_the_pool(sandbox: SandboxPool) -> None:
    with ThreadPoolExecutor(6) as threads:
        found = threads.map(lambda n: sandbox.run(Program(f"print({n} ** 2)")).stdout, range(24))
        assert [int(text) for text in found] == [n * n for n in range(24)]
    assert len(sandbox.process_ids()) == 2


def test_programs_do_not_see_each_other(sandbox: SandboxPool) -> None:
    sandbox.run(
        Program("import math, sys, builtins\nmath.pi = 3\nbuiltins.len = None\nsys.path = []")
    )
    outcome = sandbox.run(Program("import math, fractions\nprint(math.pi > 3, len('ab'))"))
    assert outcome.stdout == "True 2\n"


def test_runs_are_reproducible(sandbox: SandboxPool) -> None:
    found = {
        sandbox.run(Program("print({'a', 'b', 'c', 'd'}, hash('x'))")).stdout for _ in range(4)
    }
    assert len(found) == 1


@pytest.fixture(params=["bubblewrap", "namespaces"])
def lone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SandboxPool]:
    """A pool of one worker of each kind, soon given up on."""
    monkeypatch.setattr(pool, "GRACE_S", 0.3)
    config = SandboxConfig(isolation=request.param, time_s=1.0, workers=1)
    sandbox = sandbox_or_skip(config)
    yield sandbox
    sandbox.close()


def test_an_idle_worker_that_is_killed_is_an_error_once(lone: SandboxPool) -> None:
    (worker,) = lone.process_ids()
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(SandboxError):
        lone.run(Program("print(1)"))
    assert lone.run(Program("print(1)")).stdout == "1\n"


def test_a_worker_that_is_killed_in_a_run_is_an_error(lone: SandboxPool) -> None:
    (worker,) = lone.process_ids()
    kill = threading.Timer(0.2, os.kill, (worker, signal.SIGKILL))
    kill.start()
    with pytest.raises(SandboxError, match="died"):
        lone.run(Program("import time; time.sleep(0.9)"))
    kill.join()
    assert lone.run(Program("print(1)")).stdout == "1\n"


def test_a_worker_that_hangs_is_an_error(lone: SandboxPool) -> None:
    (worker,) = lone.process_ids()
    os.kill(worker, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(SandboxError, match="in time"):
        lone.run(Program("print(1)"))
    assert time.monotonic() - start < 4
    wait_for_end(worker)
    assert lone.run(Program("print(1)")).stdout == "1\n"


def test_no_process_is_left(lone: SandboxPool) -> None:
    (worker,) = lone.process_ids()
    family = [psutil.Process(worker), psutil.Process(worker).parent()]
    lone.close()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert lone.run(Program("print(1)")).stdout == "1\n", "a closed pool starts again"


def test_workers_end_with_the_process_that_started_them(lone: SandboxPool) -> None:
    """Killed outright, a trainer cannot say goodbye: its workers see the socket close."""
    source = (
        "import os, signal\n"
        "from nemocascade.sandbox.pool import *\n"
        f"s = SandboxPool(SandboxConfig(isolation={lone.isolation!r}, workers=1))\n"
        "print(s.process_ids()[0], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, check=False)
    wait_for_end(int(done.stdout))


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "missing", lambda isolation: "forbidden by this test")


@pytest.mark.usefixtures("forbidden")
def test_a_host_that_forbids_isolation_is_rejected() -> None:
    with pytest.raises(
        SandboxUnavailable, match=r"bubblewrap: forbidden.*namespaces.*allow_unsafe"
    ):
        SandboxPool(SandboxConfig())


@pytest.mark.usefixtures("forbidden")
def test_unsafe_is_a_choice_and_says_so() -> None:
    with pytest.warns(RuntimeWarning, match="WITHOUT isolation"):
        sandbox = SandboxPool(SandboxConfig(allow_unsafe=True, time_s=1.0, workers=1))
    try:
        assert sandbox.isolation == "none"
        assert sandbox.run(Program("print(int(input()) + 1)", stdin="1")).stdout == "2\n"
        assert sandbox.run(Program("while True: pass")).status == "time"
        assert "MemoryError" in sandbox.run(Program("x = bytearray(10 << 30)")).stderr
        left = sandbox.run(
            Program(
                "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(60)\nprint(1)"
            )
        )
        assert left.wall_s < 1
        (worker,) = sandbox.process_ids()
        assert not psutil.Process(worker).children()
        # Each program has a folder of its own, which goes with it.
        look = "import os\nprint(os.listdir('.'), os.listdir('..'))"
        found = sandbox.run(Program(look, files={"a/b": b"x"})).stdout
        assert found.startswith("['a'] ['tmp")
        assert sandbox.run(Program("import os; print(os.listdir('.'))")).stdout == "[]\n"
        assert found.count("'tmp") == 1
    finally:
        sandbox.close()


def test_isolation_that_does_not_hold_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe decides, not the fact that a worker started."""
    sandbox_or_skip(SandboxConfig(workers=1)).close()
    real = launch.start
    monkeypatch.setattr(
        launch,
        "start",
        lambda isolation, config, scratch, modules: real("none", config, "/tmp", modules),
    )
    with pytest.raises(SandboxUnavailable, match="does not hold"):
        SandboxPool(SandboxConfig(workers=1))


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"time_s\(0\).*memory_mib\(8\)"):
        SandboxPool(SandboxConfig(time_s=0, memory_mib=8))


@pytest.mark.parametrize("executes", [True, False])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_by_emulating_it(machine: str, executes: bool) -> None:
    """Every call number gives what the table says, whatever the jumps between."""
    program = seccomp.program(machine, executes=executes)
    execve = {"x86_64": 59, "aarch64": 221}[machine]
    allowed = set(seccomp.numbers(machine)) | ({execve} if executes else set())
    clone, clone3 = {"x86_64": (56, 435), "aarch64": (220, 435)}[machine]
    arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]

    def run(number: int, argument: int = 0, arch: int = arch) -> int:
        loaded = {0: number, 4: arch, 16: argument}
        at, register = 0, 0
        while True:
            code, true, false, k = program[at]
            if code == 0x20:
                register = loaded[k]
                at += 1
            elif code == 0x06:
                return k
            else:
                holds = register == k if code == 0x15 else bool(register & k)
                at += 1 + (true if holds else false)

    allow, eperm, enosys = 0x7FFF0000, 0x00050001, 0x00050000 + 38
    for number in range(600):
        if number not in (clone, clone3):
            assert run(number) == (allow if number in allowed else eperm), number
    assert run(clone3) == enosys
    assert run(clone, 17) == allow
    for bit in (17, 25, 26, 27, 28, 29, 30):
        assert run(clone, 1 << bit) == eperm
    assert run(1, arch=0x40000003) == 0x80000000
    assert run(0x40000001) == eperm
    assert not allowed & {clone, clone3}


def echoes(count: int) -> list[Program]:
    return [Program("print(input())", stdin=f"{n}\n") for n in range(count)]


@pytest.mark.parametrize("last", [0, 3, 8])
def test_a_series_ends_with_the_program_that_stops_it(sandbox: SandboxPool, last: int) -> None:
    found = sandbox.run_until(echoes(6), lambda n, outcome: outcome.stdout == f"{last}\n")
    assert [o.stdout for o in found] == [f"{n}\n" for n in range(min(6, last + 1))]


def test_programs_of_a_series_run_side_by_side_where_slots_are_free(
    sandbox: SandboxPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, together = sandbox.run, threading.Barrier(2)

    def meet(program: Program) -> Outcome:
        if program.stdin != "0\n":
            together.wait(timeout=10)
        return real(program)

    monkeypatch.setattr(sandbox, "run", meet)
    assert len(sandbox.run_until(echoes(5), lambda n, outcome: False)) == 5


def test_a_series_takes_no_slot_that_others_wait_for(
    sandbox: SandboxPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, threads = sandbox.run, set()

    def seen(program: Program) -> Outcome:
        threads.add(threading.get_ident())
        return real(program)

    monkeypatch.setattr(sandbox, "run", seen)
    with monkeypatch.context() as patch:
        patch.setattr(FairSlots, "spare", 2)
        sandbox.run_until(echoes(9), lambda n, outcome: False)
    assert len(threads) == 2
    threads.clear()
    monkeypatch.setattr(FairSlots, "spare", 0)
    assert len(sandbox.run_until(echoes(4), lambda n, outcome: False)) == 4
    assert threads == {threading.get_ident()}


def test_an_error_ends_a_series_unless_an_earlier_program_does(
    sandbox: SandboxPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sandbox.run

    def lost(program: Program) -> Outcome:
        if program.stdin == "2\n":
            raise SandboxError("a worker is gone")
        return real(program)

    monkeypatch.setattr(sandbox, "run", lost)
    assert len(sandbox.run_until(echoes(4), lambda n, outcome: n == 1)) == 2
    with pytest.raises(SandboxError, match="a worker is gone"):
        sandbox.run_until(echoes(4), lambda n, outcome: n == 3)
