"""Programs on the nodes of a Ray cluster: choice of nodes, losses, unsuitable nodes. Ray is played;
the nodes' sandboxes are real."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from helpers.fake_ray import FakeNode, FakeRay, install
from helpers.sandbox import open_sessions, sandbox_or_skip
from helpers.slurm import wait_for

from nemocascade.envs.code import Code
from nemocascade.envs.python_tool import TOOL, PythonTool
from nemocascade.recipe.envs import PythonToolConfig, RayConfig, SandboxConfig
from nemocascade.runtime import ray_cluster
from nemocascade.runtime.ray_cluster import ClusterError, ClusterSettingsError
from nemocascade.sandbox import launch, ray_actor, ray_nodes
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.sandbox.ray_sandbox import RaySandbox, open_sandbox
from nemocascade.types import Program, SandboxError, SandboxUnavailable, ToolCall

CONFIG = SandboxConfig(
    workers="ray", ray=RayConfig("head:6379", programs=8, wait_s=0.3), time_s=20.0
)
SLEEP = "import time; time.sleep({s}); print({n})"


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    """Two nodes of two slots. No thread outlives a test: it would import a real ray."""
    sandbox_or_skip(SandboxConfig(workers=1)).close()
    monkeypatch.setattr(ray_cluster, "unreachable", lambda address: "")
    monkeypatch.setattr(ray_nodes, "REFRESH_S", 0.05)
    before = set(threading.enumerate())
    yield install(monkeypatch, 2, 2)
    for thread in set(threading.enumerate()) - before:
        thread.join(30.0)


@contextmanager
def opened(config: SandboxConfig = CONFIG) -> Iterator[RaySandbox]:
    made = open_sandbox(config)
    assert isinstance(made, RaySandbox)
    try:
        yield made
    finally:
        made.close()


def runs(node: FakeNode) -> int:
    return node.started.count("run")


def test_outcomes_are_those_of_the_local_sandbox(ray: FakeRay) -> None:
    programs = [
        Program("print(int(input()) + 1)", stdin="1"),
        Program("def f(x): return [x]", function="f", calls=([1], [2])),
        Program("import os; os.kill(os.getpid(), 11)"),
        Program("raise SystemExit(3)"),
        Program("print(open('a/b').read())", files={"a/b": b"x"}),
    ]
    local = SandboxPool(SandboxConfig(workers=1, time_s=20.0))
    with opened() as sandbox:
        found = [replace(sandbox.run(p), wall_s=0.0, cpu_s=0.0) for p in programs]
    assert found == [replace(local.run(p), wall_s=0.0, cpu_s=0.0) for p in programs]
    local.close()
    assert sum(map(runs, ray.cluster)) == len(programs), "a crash is an answer's own"
    assert ray.addresses == ["head:6379"]


def test_programs_spread_by_the_slots(ray: FakeRay) -> None:
    ray.cluster[1].slots = 6
    with opened() as sandbox, ThreadPoolExecutor(8) as threads:
        assert sandbox.size == 8
        sent = [Program(SLEEP.format(s=0.5, n=n)) for n in range(8)]
        assert [o.stdout for o in threads.map(sandbox.run, sent)] == [f"{n}\n" for n in range(8)]
    assert [runs(node) for node in ray.cluster] == [2, 6]


def test_a_program_lost_with_its_node_is_repeated(ray: FakeRay) -> None:
    first, second = ray.cluster
    with opened() as sandbox, ThreadPoolExecutor(8) as threads:
        sent = [Program(SLEEP.format(s=0.4, n=n)) for n in range(12)]
        found = [threads.submit(sandbox.run, program) for program in sent]
        wait_for(lambda: runs(first), 20, "nothing runs")
        first.kill()
        assert [f.result().stdout for f in found] == [f"{n}\n" for n in range(12)]
        before = runs(first)
        assert sandbox.run(Program("print(1)")).stdout == "1\n"
        assert runs(first) == before, "a lost node is not used"
    assert runs(second) >= 10


def test_a_program_that_ends_its_nodes_is_not_repeated_for_ever(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.cluster += [FakeNode(f"more{n}", 1) for n in range(4)]

    def kills(self: Any, settings: Any, program: Program) -> None:
        [node] = [a.node for a in ray.actors.values() if a.target is self]
        node.kill()

    monkeypatch.setattr(ray_actor.NodeSandboxes, "run", kills)
    with opened() as sandbox, pytest.raises(SandboxError, match="lost with 3 nodes"):
        sandbox.run(Program("print(1)"))
    assert sum(not node.alive for node in ray.cluster) == 3


def test_an_error_of_the_sandbox_is_raised_and_not_repeated(ray: FakeRay) -> None:
    with opened() as sandbox:
        with pytest.raises(SandboxError, match="raise it"):
            sandbox.run(Program("1", files={"x": bytes(CONFIG.scratch_mib << 20)}))
        assert sum(map(runs, ray.cluster)) == 1
        sandbox.check()


def test_a_session_stays_on_its_node_and_ends_with_it(ray: FakeRay) -> None:
    tool = PythonTool(PythonToolConfig(domains=("math",)), CONFIG)
    try:
        sessions = [tool.session() for _ in range(4)]

        def say(number: int, code: str) -> str:
            [message] = sessions[number].step([ToolCall(TOOL.name, {"code": code})])
            return message.content

        for number in range(4):
            assert say(number, f"x = {number}") == ""
        assert [say(n, "print(x)") for n in range(4)] == list("0123")
        assert "Error" in say(0, "1 / 0")
        assert say(0, "print(x)") == "0"
        assert say(1, "import os; os._exit(1)").startswith("error: the interpreter has crashed")
        assert say(1, "print('x' in globals())") == "False"
        ray.cluster[0].kill()
        ray.cluster[1].kill()
        with pytest.raises(SandboxError, match="node"):
            say(0, "print(x)")
        for session in sessions:
            session.close()
    finally:
        tool.close()


def test_closed_sessions_leave_nothing(ray: FakeRay) -> None:
    with opened() as sandbox:
        session = sandbox.session(3)
        assert session.run("print(1)").output == "1\n"
        session.close()
        session.close()
        with pytest.raises(SandboxError, match="has ended"):
            session.run("print(1)")
        actors = [actor.target for actor in ray.actors.values()]
        assert not any(actor._sessions for actor in actors)
        pools = [pool for actor in actors for pool in actor._pools.values()]
        assert len(pools) == 2
        assert not sum(open_sessions(pool) for pool in pools)


def test_a_lost_cell_is_not_repeated_and_its_session_is_closed(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_cell = ray_actor.NodeSandboxes.run_cell
    with opened() as sandbox:
        session = sandbox.session(3)
        [node] = [n for n in ray.cluster if "open_session" in n.started]
        [sessions] = [a.target._sessions for a in ray.actors.values() if a.node is node]

        def lost(self: Any, name: str, source: str) -> Any:
            node.lose_calls()
            return run_cell(self, name, source)

        monkeypatch.setattr(ray_actor.NodeSandboxes, "run_cell", lost)
        assert len(sessions) == 1
        with pytest.raises(SandboxError, match="has died"):
            session.run("print(1)")
        assert not session.alive
        wait_for(lambda: not sessions, 20, "the session stays open")
        assert sandbox.run(Program("print(1)")).stdout == "1\n"
    assert node.started.count("run_cell") == 1
    retries = {name: count for n in ray.cluster for name, count in n.retries.items()}
    assert retries == {"run_cell": 0, "run": ray_nodes.RETRIES}


def test_a_failed_look_for_nodes_is_not_the_last(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = ray_nodes.RayNodes._actor

    def fails_once(self: Any, about: Any) -> Any:
        monkeypatch.setattr(ray_nodes.RayNodes, "_actor", start)
        raise ConnectionError("the head does not answer")

    with opened() as sandbox:
        monkeypatch.setattr(ray_nodes.RayNodes, "_actor", fails_once)
        ray.cluster.append(FakeNode("late", 8))
        wait_for(lambda: "late" in sandbox._nodes._nodes, 20, "the new node is not used")
    assert "the head does not answer" in caplog.text


def test_a_lost_head_is_one_warning(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="nemocascade")
    look, failures = ray_cluster.worker_nodes, list[int]()

    def fails(found: Any) -> Any:
        if len(failures) >= 5:
            return look(found)
        failures.append(1)
        raise ConnectionError("the head is lost")

    with opened():
        monkeypatch.setattr(ray_nodes, "worker_nodes", fails)
        wait_for(lambda: "answers again" in caplog.text, 20, "the nodes are not looked for again")
    assert caplog.text.count("the head is lost") == 1
    assert "answers again, after 5 failed look-ups" in caplog.text


def test_warnings_of_a_long_outage_grow_rare(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    outage, warned = ray_nodes._Outage(), list[float]()
    for _ in range(4 * 3600 // 5):
        before = len(caplog.records)
        outage.failed(ConnectionError("the head is lost"))
        if len(caplog.records) > before:
            warned.append(now - 100.0)
        now += 5.0
    assert warned == [0, 60, 120, 240, 480, 960, 1920, 3840, 7440, 11040]
    assert "(13 failed look-ups in 60 s)" in caplog.text
    outage.succeeded()
    outage.failed(ConnectionError("again"))
    assert "again (1 failed look-ups in 0 s)" in caplog.text


def test_a_pool_is_shared_and_ends_with_its_last_client(ray: FakeRay) -> None:
    [one, two] = [open_sandbox(CONFIG), open_sandbox(replace(CONFIG, ray=RayConfig("head:1")))]
    other = open_sandbox(replace(CONFIG, time_s=3.0))
    actor = next(iter(ray.actors.values())).target
    assert len(actor._pools) == 2
    one.close()
    other.close()
    wait_for(lambda: len(actor._pools) == 1, 20, "a pool stays")
    assert two.run(Program("print(1)")).stdout == "1\n"
    two.close()
    wait_for(lambda: not actor._pools, 20, "the last pool stays")


@pytest.mark.usefixtures("ray")
def test_a_node_that_cannot_isolate_is_rejected_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "missing", lambda isolation: "forbidden by this test")
    with pytest.raises(SandboxUnavailable, match=r"node node[01]: programs cannot be isolated"):
        open_sandbox(CONFIG)


@pytest.mark.usefixtures("ray")
def test_a_node_without_the_packages_is_rejected() -> None:
    with pytest.raises(SandboxUnavailable, match=r"node node.*nowhere is not a folder"):
        open_sandbox(replace(CONFIG, packages=("/nowhere",)))


@pytest.mark.usefixtures("ray")
def test_a_node_of_another_version_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"ray": "2.60.0", "python": "3.12.0", "nemocascade": "0.1"}
    monkeypatch.setattr(ray_actor, "own_versions", lambda: found)
    monkeypatch.setattr(ray_nodes, "own_versions", lambda: {**found, "nemocascade": "9.9"})
    with pytest.raises(SandboxUnavailable, match=r"nemocascade 0\.1, and this rank 9\.9"):
        open_sandbox(CONFIG)


def test_nodes_that_join_are_used_and_a_rejecting_one_is_not(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened() as sandbox:
        ray.cluster.append(FakeNode("late", 8))
        wait_for(lambda: len(sandbox._nodes._nodes) == 3, 120, "the new node is not used")
        monkeypatch.setattr(launch, "missing", lambda isolation: "forbidden by this test")
        ray.cluster.append(FakeNode("bare", 8))
        wait_for(lambda: "bare" in sandbox._nodes._excluded, 120, "it is not excluded")
        assert sandbox.run(Program("print(1)")).stdout == "1\n"
    assert "run" not in ray.cluster[-1].started


def test_nodes_with_gpus_or_without_cpus_run_nothing(ray: FakeRay) -> None:
    ray.cluster += [FakeNode("gpu", 8, gpus=8), FakeNode("trainer", 0)]
    with opened() as sandbox:
        assert sorted(sandbox._nodes._nodes) == ["node0", "node1"]


def test_a_cluster_without_nodes_ends_the_stage(ray: FakeRay) -> None:
    domain = Code(CONFIG)
    prompt = next(domain.prompts(seed=1, count=1))
    answer = prompt.demonstration
    assert domain.score(prompt, answer).reward == 1.0
    for node in ray.cluster:
        node.kill()
    assert "no node of the Ray cluster" in str(domain.score(prompt, answer).error)
    with pytest.raises(ClusterError, match="start the stage again"):
        domain.score(prompt, answer)
    assert ClusterError.exit_code == 75, "the job starts it again"
    ray.cluster.append(FakeNode("again", 2))
    wait_for(lambda: _ok(domain) and domain.score(prompt, answer).reward == 1.0, 120, "no")
    domain.close()


def test_a_tool_without_nodes_ends_the_stage(ray: FakeRay) -> None:
    tool = PythonTool(PythonToolConfig(domains=("math",)), CONFIG)
    try:
        session = tool.session()
        for node in ray.cluster:
            node.kill()
        with pytest.raises(SandboxError, match="no node of the Ray cluster"):
            session.step([ToolCall(TOOL.name, {"code": "1"})])
        with pytest.raises(ClusterError, match="start the stage again"):
            tool.session()
    finally:
        tool.close()


def _ok(domain: Code) -> bool:
    sandbox = domain.sandbox
    assert isinstance(sandbox, RaySandbox)
    return not sandbox._nodes.gone


def test_a_rank_has_its_share_of_the_slots(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.cluster[0].slots = 61
    open_ = replace(CONFIG, ray=replace(CONFIG.ray, programs=0))
    assert ray_cluster.program_slots(open_, 8) == 16
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert ray_cluster.program_slots(open_) == 42
    assert ray_cluster.program_slots(replace(open_, workers=5)) == 5
    with pytest.raises(ClusterError, match="2 of 3 nodes"):
        ray_cluster.program_slots(replace(open_, ray=replace(open_.ray, nodes=3)))


def test_what_is_wrong_is_said(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(error: Exception) -> None:
        def fail() -> None:
            raise error

        ray.connect = fail

    reject(ConnectionError("Can't find a raylet"))
    with pytest.raises(ClusterError, match="ray start --address=head:6379 --num-cpus=0"):
        open_sandbox(CONFIG)
    reject(RuntimeError("Version mismatch: The cluster was started with: Ray: 2.1"))
    with pytest.raises(ClusterSettingsError, match="Version mismatch"):
        open_sandbox(CONFIG)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterSettingsError, match="RAY_ADDRESS"):
        open_sandbox(replace(CONFIG, ray=RayConfig()))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterSettingsError, match=r"pip install 'nemocascade\[workers\]'"):
        open_sandbox(CONFIG)


def test_an_address_where_nothing_answers() -> None:
    assert "nothing answers" in ray_cluster.unreachable("127.0.0.1:1")


@pytest.mark.parametrize("address", ["head", "head:0", "head:65536", ":1", "ray://head:1", "a b:1"])
def test_an_address_is_host_and_port(address: str) -> None:
    [problem] = replace(CONFIG, ray=RayConfig(address)).problems()
    assert "write it as host:port" in problem
    assert replace(CONFIG, ray=RayConfig("10.0.0.1:6379")).problems() == []


@pytest.mark.parametrize("workers", [-1, True, 1.5, "Ray", None])
def test_workers_are_a_number_local_or_ray(workers: Any) -> None:
    [problem] = SandboxConfig(workers=workers).problems()
    assert "local or ray" in problem


def test_signals_of_the_run_stay(ray: FakeRay) -> None:
    """Ray sets a handler that ends the process on SIGTERM."""
    import signal

    before = signal.getsignal(signal.SIGTERM)
    ray.connect = lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with opened():
        assert signal.getsignal(signal.SIGTERM) == before


def test_programs_of_a_series_run_side_by_side(ray: FakeRay) -> None:
    programs = [Program(SLEEP.format(s=0.3, n=n)) for n in range(5)]
    with opened() as sandbox:
        found = sandbox.run_until(programs, lambda n, outcome: outcome.stdout == "3\n")
    assert [o.stdout for o in found] == [f"{n}\n" for n in range(4)]


def test_without_ray_the_package_works() -> None:
    """Everything that runs programs here is imported and used where ray cannot be imported."""
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "import nemocascade.plan.preflight, nemocascade.stages.grpo\n"
        "from nemocascade.envs.registry import make_environments, close_environments\n"
        "close_environments(make_environments())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
