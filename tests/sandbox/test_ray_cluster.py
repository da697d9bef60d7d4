"""A real Ray cluster of two nodes on loopback: throughput, a lost node, the same training."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.ray_nodes import ROOT, Cluster, ray_cluster
from helpers.sandbox import sandbox_or_skip

from nemocascade.recipe.envs import RayConfig, SandboxConfig
from nemocascade.runtime.ray_cluster import cluster_problems
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.sandbox.ray_sandbox import AnySandbox, RaySandbox, open_sandbox
from nemocascade.types import Outcome, Program, SandboxError

if importlib.util.find_spec("ray") is None:
    pytest.skip("ray is not installed: pip install 'nemocascade[workers]'", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SLOTS = 32


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of 32 slots, which this process has joined."""
    import ray

    sandbox_or_skip(SandboxConfig(workers=1)).close()
    with ray_cluster(SLOTS, SLOTS) as made:
        try:
            yield made
        finally:
            ray.shutdown()


def settings(cluster: Cluster, programs: int = 0, nodes: int = 2) -> SandboxConfig:
    named = RayConfig(cluster.address, nodes=nodes, programs=programs, wait_s=120)
    return SandboxConfig(workers="ray", ray=named)


@pytest.fixture
def sandbox(cluster: Cluster) -> Iterator[RaySandbox]:
    made = open_sandbox(settings(cluster))
    assert isinstance(made, RaySandbox)
    yield made
    made.close()


def run_all(sandbox: AnySandbox, programs: Sequence[Program], threads: int) -> list[Outcome]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(sandbox.run, programs))


def test_short_programs(cluster: Cluster) -> None:
    """Short programs run as fast as in the pool of this host, up to the calls between processes:
    0.8 of its rate on a quiet host, less where other processes take turns with Ray's."""
    boxes: list[AnySandbox] = [
        SandboxPool(SandboxConfig(workers=2)),
        open_sandbox(settings(cluster, programs=8)),
    ]
    rates: list[list[float]] = [[], []]
    programs = [Program(f"print({n} + 1)") for n in range(150)]
    for turn in range(6):
        for box, found in zip(boxes, rates, strict=True):
            started = time.perf_counter()
            outcomes = run_all(box, programs, 8)
            assert [int(o.stdout) for o in outcomes] == list(range(1, 151))
            if turn:  # the first one starts the workers
                found.append(len(programs) / (time.perf_counter() - started))
    for box in boxes:
        box.close()
    for name, found in zip(("local", "on two nodes of Ray"), rates, strict=True):
        middle, best = statistics.median(found), max(found)
        print(f"\nshort programs {name}: {middle:.0f}/s, {best:.0f}/s at best")
    local, ray = map(max, rates)
    assert ray >= 0.2 * local


def test_sleeping_programs_keep_all_slots_busy(sandbox: RaySandbox) -> None:
    assert sandbox.size == 4 * SLOTS
    run_all(sandbox, [Program("import time; time.sleep(1)")] * sandbox.size, sandbox.size)
    started = time.perf_counter()
    outcomes = run_all(sandbox, [Program("import time; time.sleep(1)")] * 2048, sandbox.size)
    seconds = time.perf_counter() - started
    assert {o.status for o in outcomes} == {"ok"}
    busy = sum(o.wall_s for o in outcomes) / seconds
    print(f"\n2,048 programs of one second: {seconds:.1f} s, {busy:.1f} of 64 slots busy")
    assert busy >= 0.7 * 2 * SLOTS


def test_a_killed_node_loses_no_program(cluster: Cluster) -> None:
    cluster.add(8)
    cluster.wait(3)
    sandbox = RaySandbox(settings(cluster, programs=48, nodes=3))
    session = sandbox.session(2)
    try:
        sent = [Program(f"import time; time.sleep(0.5); print({n})") for n in range(192)]
        with ThreadPoolExecutor(48) as threads:
            found = [threads.submit(sandbox.run, program) for program in sent]
            [f.result() for f in found[:48]]
            cluster.kill(8)
            killed = time.perf_counter()
            assert [int(f.result().stdout) for f in found] == list(range(192))
        print(f"\nafter kill -9 of a node: all answered in {time.perf_counter() - killed:.1f} s")
        assert len(sandbox._nodes._excluded) == 1, "the node had nothing to lose"
        assert sandbox.run(Program("raise SystemExit(3)")).exit_status == 3
        if session._node.about.slots == 8:
            with pytest.raises(SandboxError):
                session.run("print(1)")
        else:
            assert session.run("print(1)").output == "1\n"
    finally:
        sandbox.close()


def test_a_code_stage_ends_with_the_same_bits(cluster: Cluster, tmp_path: Path) -> None:
    script = ROOT / "tests" / "helpers" / "junk_code.py"
    path = f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}"

    def run(name: str, start: str, address: str) -> str:
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path / name), start, address],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()[-1]

    start = run("start", "", "")
    found = [json.loads(run(n, start, a)) for n, a in (("local", ""), ("ray", cluster.address))]
    assert found[0] == found[1]
    metrics = [
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("local", "ray")
    ]
    rewards = [[row["reward"] for row in rows] for rows in metrics]
    assert rewards[0] == rewards[1]
    assert any(0 < reward < 1 for reward in rewards[0]), "no verdict decided anything"
    print(f"\nrewards {rewards[0]}, weights equal: {len(found[0])} files")


def test_preflight_asks_the_cluster(cluster: Cluster) -> None:
    problems, said = cluster_problems(RayConfig(cluster.address))
    assert not problems
    # Ray may not know yet that the node of another test is lost.
    assert re.search(rf"{cluster.address}: [23] nodes, (64|72) slots", said)
    [problem], _ = cluster_problems(RayConfig(cluster.address, nodes=9))
    assert "nodes with CPUs and without GPUs, and 9 are needed" in problem
    [problem], _ = cluster_problems(RayConfig("127.0.0.1:1"))
    assert "nothing answers" in problem
