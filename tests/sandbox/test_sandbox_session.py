"""Sessions of the sandbox: state between cells, limits of each cell, and what is left behind."""

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
from helpers.sandbox import open_sessions, sandbox_or_skip, wait_for_end

from nemocascade.recipe.envs import SandboxConfig
from nemocascade.sandbox import launch, session
from nemocascade.sandbox.inside.harness import INTERRUPTED
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.sandbox.session import SandboxSession
from nemocascade.types import Program, SandboxError

LIMITS = {"time_s": 0.5, "workers": 2, "memory_mib": 256, "output_kib": 64, "scratch_mib": 4}


@pytest.fixture(scope="module", params=["bubblewrap", "namespaces", "none"])
def pool(request: pytest.FixtureRequest) -> Iterator[SandboxPool]:
    if request.param == "none":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "missing", lambda isolation: "forbidden by this test")
            with pytest.warns(RuntimeWarning, match="WITHOUT isolation"):
                made = SandboxPool(SandboxConfig(allow_unsafe=True, **LIMITS))  # type: ignore[arg-type]
    else:
        made = sandbox_or_skip(SandboxConfig(isolation=request.param, **LIMITS))  # type: ignore[arg-type]
    yield made
    made.close()


@pytest.fixture
def opened(pool: SandboxPool) -> Iterator[SandboxSession]:
    made = pool.session(50)
    yield made
    made.close()


def alive_below(process: int) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(process).children(recursive=True)
    return found


def test_state_persists_between_cells(opened: SandboxSession) -> None:
    assert opened.run("import math\nx = [1]\ndef f(n): return n + len(x)").output == ""
    assert opened.run("x.append(2)\nf(40)").output == "42\n"
    assert opened.run("math.factorial(5)").output == "120\n"
    assert opened.run("open('a', 'w').write('kept')").output == "4\n"
    assert opened.run("print(open('a').read()); None").output == "kept\n"
    assert opened.run("class B: b: int\nB.__annotations__").output == "{'b': <class 'int'>}\n"


def test_output_is_in_order_and_complete(opened: SandboxSession) -> None:
    source = "import sys\nfor n in range(3):\n  print(n)\n  print('e', n, file=sys.stderr)\n'last'"
    lines = opened.run(source).output.splitlines()
    assert sorted(lines) == sorted(["0", "1", "2", "e 0", "e 1", "e 2", "'last'"])
    assert opened.run("import os\nos.write(1, b'direct\\n'); None").output == "direct\n"
    text = opened.run(f"print('x' * {60 << 10})").output
    assert text == "x" * (60 << 10) + "\n"


def test_an_error_is_text_and_keeps_the_state(opened: SandboxSession) -> None:
    failed = opened.run("y = 5\ndef f():\n  return y / 0\nprint('before')\nf()")
    assert failed.status == "ok"
    assert failed.output.startswith("before\nTraceback (most recent call last):\n")
    assert 'File "<cell 1>", line 3, in f\n    return y / 0' in failed.output
    assert failed.output.endswith("ZeroDivisionError: division by zero\n")
    assert "harness" not in failed.output
    assert "SyntaxError" in opened.run("def f(:").output
    assert "EOFError" in opened.run("input()").output
    assert "SystemExit" in opened.run("exit()").output
    assert "MemoryError" in opened.run("z = bytearray(10 << 30)").output
    closed = opened.run("import sys\nsys.stderr.close()\nsys.stdout = None\n1 / 0")
    assert (closed.status, closed.output) == ("ok", "")
    shown = "sys.stdout = sys.__stdout__ or open('/dev/stdout', 'w')\nprint(y, flush=True)"
    assert opened.run(shown).output == "5\n"


def test_a_cell_over_its_time_is_interrupted_and_keeps_the_state(opened: SandboxSession) -> None:
    opened.run("y = 7")
    for source in ("while True: y = 8", "import time\ntime.sleep(1000)"):
        start = time.monotonic()
        found = opened.run(source)
        assert time.monotonic() - start < 10
        assert (found.status, opened.alive) == ("ok", True)
        assert found.output == f"{INTERRUPTED}\n"
    # The limit is one of each cell.
    busy = "t = time.process_time()\nwhile time.process_time() < t + 0.3: pass\ny"
    assert [opened.run(busy).output for _ in range(3)] == ["8\n"] * 3


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("import signal\nsignal.signal(2, signal.SIG_IGN)\nwhile True: pass", "time"),
        ("n = 0\nwhile True:\n  try:\n    while n >= 0: n += 1\n  except BaseException: 0", "time"),
        ("while True: print('x' * 1000)", "output"),
        ("import os\nos._exit(3)", "failed"),
        ("import os\nos.abort()", "failed"),
        ("import os\nos.close(4)\nos.close(3)\nwhile True: pass", "time"),
    ],
)
def test_a_cell_that_goes_on_ends_its_session_alone(
    pool: SandboxPool, opened: SandboxSession, source: str, status: str
) -> None:
    before = open_sessions(pool)
    other = pool.session(5)
    other.run("kept = 1")
    start = time.monotonic()
    found = opened.run(source)
    assert time.monotonic() - start < 12
    assert (found.status, opened.alive) == (status, False)
    assert len(found.output) <= 64 << 10
    with pytest.raises(SandboxError, match="has ended"):
        opened.run("1")
    assert other.run("kept").output == "1\n"
    other.close()
    assert open_sessions(pool) == before - 1
    assert pool.run(Program("print(1)")).stdout == "1\n"


def test_a_forged_end_gains_no_time(opened: SandboxSession) -> None:
    """A cell may say that it has ended: the next cell waits for it, and the limit ends both."""
    assert opened.run("import os\nos.write(3, b'1\\n')\nwhile True: pass").status == "ok"
    found = opened.run("print('next')")
    assert (found.status, found.output) == ("ok", f"{INTERRUPTED}\nnext\n")
    opened.run("import os\nos.write(3, b'4\\n')")
    assert opened.run("print('last')").output == "last\n"


def test_a_thread_between_cells_has_no_more_time_than_a_cell(opened: SandboxSession) -> None:
    opened.run("import threading\ndef spin():\n  while True: pass")
    assert opened.run("threading.Thread(target=spin, daemon=True).start()").status == "ok"
    assert opened._worker is not None
    deadline = time.monotonic() + 60
    while alive_below(opened._worker.pid):
        assert time.monotonic() < deadline, "the thread still runs"
        time.sleep(0.1)
    found = opened.run("1")
    assert (found.status, opened.alive) == ("time", False)


def test_sessions_share_nothing(pool: SandboxPool) -> None:
    for _ in range(2):
        one, other = pool.session(5), pool.session(5)
        one.run("import math\nmath.pi = 3\nx = 1\nopen('a', 'w').write('b')")
        assert other.run("import math, os\nmath.pi > 3, 'x' in globals(), os.path.exists('a')")
        found = other.run("math.pi > 3, 'x' in globals(), os.path.exists('a')").output
        assert found == "(True, False, False)\n"
        one.close()
        other.close()
        one.close()


def test_threads_have_their_own_sessions(pool: SandboxPool) -> None:
    def work(n: int) -> str:
        made = pool.session(3)
        try:
            made.run(f"n = {n}")
            return made.run("n ** 2").output
        finally:
            made.close()

    with ThreadPoolExecutor(6) as threads:
        assert [int(text) for text in threads.map(work, range(12))] == [n * n for n in range(12)]
    assert open_sessions(pool) == 0


def test_only_as_many_cells_run_as_there_are_workers(
    pool: SandboxPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most = [0], [0]
    real = SandboxSession._run

    def counted(self: SandboxSession, worker: launch.Worker, source: str) -> session.CellOutcome:
        running[0] += 1
        most[0] = max(most[0], running[0])
        try:
            return real(self, worker, source)
        finally:
            running[0] -= 1

    monkeypatch.setattr(SandboxSession, "_run", counted)
    made = [pool.session(2) for _ in range(5)]
    with ThreadPoolExecutor(5) as threads:
        list(threads.map(lambda s: s.run("import time\ntime.sleep(0.1)"), made))
    for one in made:
        one.close()
    assert most[0] == 2


def test_nothing_is_left_of_a_closed_session(pool: SandboxPool) -> None:
    made = pool.session(3)
    assert made._worker is not None
    worker = made._worker.pid
    made.run("import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(1000)")
    assert alive_below(worker)
    open_before = psutil.Process().num_fds()
    made.close()
    assert not alive_below(worker)
    assert psutil.Process().num_fds() == open_before - 3
    assert worker in pool.process_ids(), "the worker is kept for the next session"
    again = pool.session(3)
    assert again._worker is not None
    assert again._worker.pid == worker
    pool.close()
    wait_for_end(worker)
    assert not again.alive
    assert open_sessions(pool) == 0


def test_a_lost_worker_is_an_error_of_the_host(pool: SandboxPool) -> None:
    made = pool.session(3)
    assert made._worker is not None
    kill = threading.Timer(0.2, os.kill, (made._worker.pid, signal.SIGKILL))
    kill.start()
    with pytest.raises(SandboxError):
        made.run("import time\ntime.sleep(0.8)")
    kill.join()
    assert not made.alive
    assert pool.session(3).run("1").output == "1\n"


def test_a_silent_worker_is_an_error_of_the_host(
    pool: SandboxPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "GRACE_S", 0.3)
    monkeypatch.setattr(session, "STARVED_FACTOR", 0.0)
    made = pool.session(3)
    assert made._worker is not None
    os.kill(made._worker.pid, signal.SIGSTOP)
    with pytest.raises(SandboxError, match="in time"):
        made.run("while True: pass")
    assert not made.alive


def test_a_cell_that_got_no_cpu_is_an_error_of_the_host(
    pool: SandboxPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "STARVED_FACTOR", 0.0)
    made = pool.session(3)
    with pytest.raises(SandboxError, match=r"waited .* s for a CPU: the host is too busy"):
        made.run("import signal, time\nsignal.signal(2, signal.SIG_IGN)\ntime.sleep(100)")
    assert not made.alive


def test_a_session_ends_with_the_process_that_opened_it(pool: SandboxPool) -> None:
    if pool.isolation == "none":
        pytest.skip("needs a backend that a fresh process can choose")
    source = (
        "import os, signal\n"
        "from nemocascade.sandbox.pool import *\n"
        f"s = SandboxPool(SandboxConfig(isolation={pool.isolation!r}, workers=1)).session(3)\n"
        "s.run('import os, time\\nif os.fork() == 0: time.sleep(1000)')\n"
        "print(s._worker.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, check=False)
    wait_for_end(int(done.stdout))
