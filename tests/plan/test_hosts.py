"""Facts of hosts, and the rules that compare them."""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from nemocascade.megatron.world import start_world
from nemocascade.plan import hosts
from nemocascade.plan.findings import Preflight
from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.hosts import (
    HostFacts,
    check_hosts,
    clock_findings,
    device_findings,
    host_facts,
    layout_findings,
    limit_findings,
    version_findings,
)
from nemocascade.plan.job import Job, job_of_recipe
from nemocascade.plan.memory import GIB, every_rank
from nemocascade.recipe import EngineConfig, ParallelConfig, StageRecipe, load_any_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NAMES = [f"node{i}" for i in range(6)]


@pytest.fixture(scope="module")
def job() -> Job:
    """The 30B IF-RL job on 16 GPUs with offloading."""
    recipe = load_any_recipe(RECIPES / "nemotron3_nano_30b" / "if_rl.py")
    assert isinstance(recipe, StageRecipe)
    found = job_of_recipe(recipe, find_gpu("h200"), 16, preset="nemotron3_nano_30b")
    return replace(found, rollout=replace(found.rollout, offload=True))


def same(count: int = 6, **facts: object) -> list[HostFacts]:
    """Hosts with the same facts."""
    return [HostFacts(host=name, **facts) for name in NAMES[:count]]  # type: ignore[arg-type]


def test_equal_hosts_have_no_finding(job: Job) -> None:
    facts = same(2, versions={"torch": "2.13.0", "driver": "580.1"}, memory=1 << 42, shared=1 << 40)
    assert version_findings(facts) == ([], [])
    assert clock_findings(facts) == []
    assert layout_findings(job, [n for n in NAMES[:2] for _ in range(8)]) == []
    assert limit_findings(job, facts, {"node0": 8, "node1": 8}) == ([], [])
    assert device_findings(facts) == []


def test_versions_that_must_agree_are_problems() -> None:
    facts = same(versions={"NCCL": "2.27.5", "driver": "580.1"})
    facts[4] = replace(facts[4], versions={"NCCL": "2.26.2", "driver": "570.1"})
    [problem], [warning] = version_findings(facts)
    assert problem == (
        "hosts differ in NCCL: 2.27.5 on node0, node1, node2 and 2 more; 2.26.2 on node4: use one "
        "installation on all of them"
    )
    assert "570.1 on node4" in warning
    facts[4] = replace(facts[4], versions={"driver": "580.1"})
    [problem], _ = version_findings(facts)
    assert "absent on node4" in problem


def test_clocks_are_compared_with_the_median() -> None:
    facts = [replace(f, clock_s=1e9 + i) for i, f in enumerate(same(5))]
    assert clock_findings(facts) == []
    facts[1] = replace(facts[1], clock_s=1e9 - 3600)
    [warning] = clock_findings(facts)
    assert "node1" in warning
    assert "by -3602 s" in warning


def test_ranks_are_spread_evenly_and_keep_tensor_groups_on_a_host(job: Job) -> None:
    four = replace(job, parallel=replace(job.parallel, tp=4, ep=1))
    [uneven, crossing] = layout_findings(four, ["a"] * 6 + ["b"] * 10)
    assert uneven.startswith("a has 6 ranks where others have 10")
    assert crossing.startswith("1 tensor-parallel groups cross hosts, the first at rank 4: ")


def test_host_memory_must_hold_what_is_offloaded(job: Job) -> None:
    needed = max(m.offloaded for m in every_rank(job))
    assert needed > GIB
    enough = int(8 * needed) + 1
    facts = same(2, memory=enough, shared=1 << 40)
    ranks = Counter({"node0": 8, "node1": 8})
    assert limit_findings(job, facts, ranks) == ([], [])
    facts[1] = replace(facts[1], memory=enough // 2, shared=64 << 20, locked=64 << 10)
    [problem], warnings = limit_findings(job, facts, ranks)
    assert problem.startswith(f"node1: {enough // 2 / GIB:.1f} GiB are free of memory")
    assert "--rollout.offload False" in problem
    assert warnings[0].startswith("node1: 0.1 GiB are free in /dev/shm")
    assert "ulimit -l unlimited" in warnings[1]
    # One host needs no InfiniBand, and one rank a host no shared memory.
    alone = limit_findings(job, facts[1:], {"node1": 1})[1]
    assert alone == []


def test_faults_of_devices_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "*remapped*) echo '00000000:1B:00.0, No, No'; echo '00000000:43:00.0, Yes, No';;\n"
        "*) echo '0, 580.65.06, 0'; echo '1, 580.65.06, 3'; echo '2, 580.65.06, [N/A]';;\n"
        "esac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    facts = host_facts(on_gpu=True)
    assert facts.versions["driver"] == "580.65.06"
    warnings = device_findings([replace(facts, host="a", unlinked=((0, 1), (0, 2)))])
    assert len(warnings) == 3
    assert warnings[0].startswith("a: GPU 1 has 3 uncorrected memory errors")
    assert "00000000:43:00.0" in warnings[1]
    assert warnings[2].startswith("a: GPUs 0 and 1 have no peer access, 2 pairs in all")
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert host_facts(on_gpu=True).faults == []


def test_a_folder_that_a_host_does_not_see_is_a_problem(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "FOLDER_S", 0.1)
    job = replace(job, rollout=replace(job.rollout, offload=False))
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    try:
        for sees in (True, False):
            if not sees:
                monkeypatch.setattr(hosts, "_write", lambda path: True)
            found = Preflight()
            check_hosts(world, job, tmp_path, found)
            assert [f.check for f in found.findings] == [
                "hosts",
                "limits of the hosts",
                "run folder on all hosts",
            ]
            assert bool(found.problems) != sees
        assert f"run_dir({tmp_path}) of the main rank" in found.problems[0]
        # A job that only reads may have no folder.
        monkeypatch.undo()
        found = Preflight()
        check_hosts(world, job, tmp_path / "gone", found)
        assert found.problems == []
    finally:
        world.close()


def test_a_folder_that_cannot_be_listed_is_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "probe").touch()
    assert hosts._appears(tmp_path / "probe", within_s=0.0)

    def stale(_folder: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "iterdir", stale)
    assert not hosts._appears(tmp_path / "probe", within_s=0.0)
