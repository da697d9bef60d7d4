"""Limits of control groups, of both versions, up to the root."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from nemocascade.runtime import host_memory

MIB = 1 << 20


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_version_2_counts_every_group_up_to_the_root(tmp_path: Path) -> None:
    """The parent has the smaller limit; cached files are no use of memory."""
    group = "sys/fs/cgroup/slurm/job_7"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
            f"{group}/step_0/memory.max": "max\n",
            f"{group}/memory.max": f"{8 * MIB}\n",
            f"{group}/memory.current": f"{7 * MIB}\n",
            f"{group}/memory.stat": f"anon 1\ninactive_file {5 * MIB}\n",
            "sys/fs/cgroup/slurm/memory.max": f"{6 * MIB}\n",
            "sys/fs/cgroup/slurm/memory.current": f"{1 * MIB}\n",
        },
    )
    assert list(host_memory._limits(tmp_path)) == [(8 * MIB, 2 * MIB), (6 * MIB, MIB)]


def test_version_1_reads_the_memory_controller(tmp_path: Path) -> None:
    """In a container the name is that of the host, and the limits are at the root."""
    root = "sys/fs/cgroup/memory"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/init\n",
            f"{root}/memory.limit_in_bytes": f"{9 * MIB}\n",
            f"{root}/memory.usage_in_bytes": f"{4 * MIB}\n",
            f"{root}/memory.stat": f"inactive_file 1\ntotal_inactive_file {3 * MIB}\n",
        },
    )
    assert list(host_memory._limits(tmp_path)) == [(9 * MIB, MIB)]


def test_the_smallest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    host = psutil.virtual_memory()
    monkeypatch.setattr(host_memory, "_limits", lambda root: iter([]))
    assert host_memory.total_memory() == host.total
    assert 0 < host_memory.available_memory() <= host.total
    limits = [(100 * MIB, 30 * MIB), (80 * MIB, 20 * MIB), (90 * MIB, 95 * MIB)]
    monkeypatch.setattr(host_memory, "_limits", lambda root: iter(limits[:2]))
    assert (host_memory.total_memory(), host_memory.available_memory()) == (80 * MIB, 60 * MIB)
    monkeypatch.setattr(host_memory, "_limits", lambda root: iter(limits))
    assert host_memory.available_memory() == 0


def test_no_control_group_is_no_limit(tmp_path: Path) -> None:
    assert list(host_memory._limits(tmp_path)) == []
