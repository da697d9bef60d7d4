"""Throughput and cost of programs in the sandbox, and the outcome of attacks on it.

    python benchmarks/end_to_end/bench_sandbox.py
    python benchmarks/end_to_end/bench_sandbox.py --out benchmarks/results/<record>.json
    python benchmarks/end_to_end/bench_sandbox.py --programs 20 --rounds 1     # a quick look

Every row runs the same short programs with their hidden tests, in rounds that alternate in one
process. The pool runs with both isolation backends. It is compared with a fresh interpreter per
program, without isolation and in a fresh bubblewrap. Core-seconds are the CPU time of this process,
the workers and the programs. Answers are checked.

The paper ran 2,048 executions in 427.2 s on 384 cores: 80.1 core-seconds each. Its programs are
contest solutions with all their tests, ours are short. Our figure therefore shows the overhead of
the sandbox; it is not a comparison of sandboxes.

Exit code: 0 fine; 1 an answer is wrong; 3 the goal is missed and `--strict` was given.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.run import new_record, recording_parser, write_record  # noqa: E402
from nemocascade.recipe.envs import SandboxConfig  # noqa: E402
from nemocascade.sandbox.pool import SandboxPool  # noqa: E402
from nemocascade.types import Program, SandboxUnavailable  # noqa: E402

GOAL_PER_S = 50.0
PAPER = {"executions": 2048, "cores": 384, "seconds": 427.2}

ATTACKS = {
    "infinite loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "10 GB of memory": "x = bytearray(10 << 30)",
    "10 GB of output": "import os\nfor _ in range(163840): os.write(1, b'x' * 65536)",
    "10 GB into scratch": "f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "socket": "import socket; socket.create_connection(('127.0.0.1', 22))",
    "read a checkpoint": "open({file!r}, 'rb').read()",
    "environment variables": "import os; print(os.environ['SANDBOX_BENCH_SECRET'])",
    "symbolic link": "import os; os.symlink({file!r}, 'l'); open('l').read()",
    "/proc/1/environ": "open('/proc/1/environ').read()",
    "ptrace": "import ctypes\n"
    "if ctypes.CDLL(None).ptrace(16, 1, 0, 0) < 0: raise OSError('refused')",
    "kill the parent": "import os; os.kill(os.getppid() or 2, 9)",
    "start a program": "import os; os.execv('/usr/bin/env', ['env'])",
    "thread that stays": "import threading, time\n"
    "threading.Thread(target=time.sleep, args=(1000,)).start()",
    "process that stays": "import os, time\nif os.fork() == 0: time.sleep(1000)",
}


@dataclass
class Row:
    """One way to run a program, with seconds and CPU seconds of each round.

    cpu_s: reads the total CPU time of all processes involved; None if it is not visible.
    """

    name: str
    run: Callable[[Program], str]
    threads: int
    cpu_s: Callable[[], float] | None
    rounds_s: list[float] = field(default_factory=list)
    core_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)


def make_programs(count: int) -> list[tuple[Program, str]]:
    """Short scripts with their output."""
    found = []
    for n in range(count):
        source = (
            "import sys\n"
            "values = [int(v) for v in sys.stdin.read().split()]\n"
            f"print(sum(v * {n} for v in values), max(values))"
        )
        values = range(n, n + 100)
        stdin = " ".join(map(str, values))
        found.append((Program(source, stdin=stdin), f"{sum(values) * n} {max(values)}\n"))
    return found


def own_cpu_s() -> float:
    """CPU time of this process and of the children it has reaped."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, kinds))


def pool_row(isolation: str, workers: int, config: SandboxConfig) -> Row:
    """A row for a pool; its workers' CPU time includes the programs that they have reaped."""
    sandbox = SandboxPool(config)

    def cpu_s() -> float:
        times = [psutil.Process(p).cpu_times() for p in sandbox.process_ids()]
        reaped: float = sum(t.user + t.system + t.children_user + t.children_system for t in times)
        return own_cpu_s() + reaped

    name = f"pool, {isolation}, {workers} workers"
    return Row(name, lambda program: sandbox.run(program).stdout, workers, cpu_s)


def fresh_row(name: str, prefix: list[str], threads: int) -> Row:
    """A row with a fresh interpreter for each program."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    command = [*prefix, python, "-I", "-S", "-c"]

    def run(program: Program) -> str:
        done = subprocess.run(
            [*command, program.source], input=program.stdin, capture_output=True, text=True
        )
        return done.stdout

    # bubblewrap's inner process reaps the program, so its CPU time is not visible here.
    return Row(name, run, threads, None if prefix else own_cpu_s)


def make_rows(cores: int, time_s: float) -> list[Row]:
    rows = []
    for isolation in ("bubblewrap", "namespaces"):
        for workers in (cores, 2 * cores):
            config = SandboxConfig(isolation=isolation, workers=workers, time_s=time_s)
            try:
                rows.append(pool_row(isolation, workers, config))
            except SandboxUnavailable as error:
                print(f"skipped: {error}")
    rows.append(fresh_row("fresh interpreter, no isolation", [], cores))
    if shutil.which("bwrap"):
        prefix = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--"]
        rows.append(fresh_row("fresh interpreter in fresh bubblewrap", prefix, cores))
    return rows


def run_round(row: Row, programs: list[tuple[Program, str]]) -> bool:
    """Run all programs once; returns True if every answer is right."""

    def timed(entry: tuple[Program, str]) -> bool:
        start = time.perf_counter()
        right = row.run(entry[0]) == entry[1]
        row.latency_s.append(time.perf_counter() - start)
        return right

    cpu_s = row.cpu_s() if row.cpu_s else 0.0
    start = time.perf_counter()
    with ThreadPoolExecutor(row.threads) as threads:
        right = all(list(threads.map(timed, programs)))
    row.rounds_s.append(time.perf_counter() - start)
    if row.cpu_s:
        row.core_s.append(row.cpu_s() - cpu_s)
    return right


def summary(row: Row, programs: int) -> dict[str, Any]:
    ordered = sorted(row.latency_s)
    return {
        "name": row.name,
        "threads": row.threads,
        "programs_per_s": programs / statistics.median(row.rounds_s),
        "core_s_per_program": statistics.median(row.core_s) / programs if row.core_s else None,
        "latency_median_s": statistics.median(ordered),
        "latency_p95_s": ordered[int(0.95 * len(ordered))],
        "rounds_s": row.rounds_s,
    }


def attack_table() -> list[dict[str, Any]]:
    """Run each attack once, with a limit of one second."""
    os.environ["SANDBOX_BENCH_SECRET"] = "secret"
    config = SandboxConfig(workers=1, time_s=1.0, memory_mib=256)
    sandbox = SandboxPool(config)
    found = []
    for name, source in ATTACKS.items():
        start = time.perf_counter()
        outcome = sandbox.run(Program(source.replace("{file!r}", repr(__file__))))
        said = outcome.stderr.strip().splitlines()
        entry: dict[str, Any] = {
            "attack": name,
            "isolation": sandbox.isolation,
            "outcome": outcome.status,
            "seconds": time.perf_counter() - start,
            # Records contain no folder names of the machine.
            "said": said[-1].replace(f"{ROOT}/", "") if said else "",
        }
        print(f"  {name:24s} {entry['outcome']:8s} {entry['seconds']:6.2f} s  {entry['said'][:60]}")
        found.append(entry)
    sandbox.close()
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = recording_parser(__doc__)
    parser.add_argument("--programs", type=int, default=200, help="programs of a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    cores = len(os.sched_getaffinity(0))
    programs = make_programs(options.programs)
    rows = make_rows(cores, time_s=10.0)
    right = True
    for row in rows:
        right &= run_round(row, programs[:10])  # starts all workers
        row.rounds_s, row.core_s, row.latency_s = [], [], []
    for turn in range(options.rounds):
        for row in rows if turn % 2 == 0 else reversed(rows):
            right &= run_round(row, programs)
    paper_s = PAPER["cores"] * PAPER["seconds"] / PAPER["executions"]
    print(f"{options.programs} programs a round, {options.rounds} rounds, {cores} cores")
    print(f"  the paper's executions: {paper_s:.1f} core-s each")
    results = [summary(row, options.programs) for row in rows]
    for r in results:
        core_s = r["core_s_per_program"]
        cost = "cost not seen" if core_s is None else f"{1e3 * core_s:5.1f} core-ms each"
        print(
            f"  {r['name']:40s} {r['programs_per_s']:7.1f} programs/s  {cost:19s}  "
            f"latency {1e3 * r['latency_median_s']:6.1f} ms, p95 {1e3 * r['latency_p95_s']:6.1f} ms"
        )
    best = max((r["programs_per_s"] for r in results if r["name"].startswith("pool")), default=0.0)
    print(f"  goal {GOAL_PER_S:g} programs/s: {'met' if best >= GOAL_PER_S else 'MISSED'}")
    attacks = attack_table() if best else []
    goal = {"text": f"{GOAL_PER_S:g} programs/s", "value": best, "met": best >= GOAL_PER_S}
    record = new_record(
        "sandbox",
        torch.device("cpu"),
        settings={"programs": options.programs, "rounds": options.rounds, "cores": cores},
        sandbox=asdict(SandboxConfig()),
        paper=PAPER | {"core_s_per_execution": paper_s},
        rows=results,
        attacks=attacks,
        goals=[goal],
    )
    write_record(options.out, record)
    if not right:
        print("an answer is wrong")
        return 1
    return 3 if options.strict and best < GOAL_PER_S else 0


if __name__ == "__main__":
    sys.exit(main())
