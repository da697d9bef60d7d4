"""The container files and `make setup GPU=1`: what they name exists, and they agree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKER, APPTAINER = ROOT / "Dockerfile", ROOT / "apptainer.def"
KNOWN = {"ARG", "FROM", "SHELL", "RUN", "ENV", "WORKDIR", "COPY", "CMD"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, with continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (name, rest.strip()) for name, _, rest in (x.partition(" ") for x in joined.split("\n"))
    ]


def sections(text: str) -> dict[str, str]:
    """Sections of an Apptainer definition; its header is the one without a name."""
    parts = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def test_the_dockerfile_builds_from_a_pinned_base() -> None:
    found = instructions(DOCKER.read_text())
    assert {name for name, _ in found} <= KNOWN
    arguments = dict(rest.split("=", 1) for name, rest in found if name == "ARG")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d\d\.\d\d", arguments["BASE"])
    assert ("FROM", "${BASE}") in found
    runs = [rest for name, rest in found if name == "RUN"]
    assert runs[-1] == "make setup GPU=1"
    assert all(
        "--no-install-recommends" in r and "rm -rf /var/lib/apt/lists" in r for r in runs[:-1]
    )
    assert found[-1] == ("CMD", '["nemocascade", "--help"]')


def test_the_apptainer_definition_is_that_of_the_dockerfile() -> None:
    found, docker = sections(APPTAINER.read_text()), DOCKER.read_text()
    assert list(found) == ["", "files", "post", "environment", "runscript"]
    header = dict(re.findall(r"^(\w+): (\S+)$", found[""], re.MULTILINE))
    assert header["Bootstrap"] == "docker"
    assert f"ARG BASE={header['From']}\n" in docker
    copied = [line.split() for line in found["files"].splitlines() if line.strip()]
    assert all(target == f"/opt/nemocascade/{source}" for source, target in copied)
    missing = [source for source, _ in copied if not (ROOT / source).exists()]
    assert not missing
    # What `make setup` and the package map of setup.py read.
    needed = {
        "Makefile",
        "setup.py",
        "pyproject.toml",
        "CMakeLists.txt",
        "tools",
        "csrc",
        "kernels",
    }
    assert needed | {"nemocascade", "nemocascade_vllm", "recipes"} <= {s for s, _ in copied}
    packages = re.findall(r"^ +(build-essential .*)$", docker, re.MULTILINE)[0].rstrip("\\ ")
    assert packages in found["post"]
    assert "make setup GPU=1" in found["post"]
    for name in ("post", "runscript", "environment"):
        subprocess.run(["sh", "-n"], input=found[name], text=True, check=True)


def gpu_packages(*arguments: str, path: str | None = None) -> str:
    """Output of tools/gpu_packages.py."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_packages.py"), *arguments],
        capture_output=True, text=True, check=True, env=None if path is None else {"PATH": path},
    ).stdout  # fmt: skip


def test_gpu_packages_keep_torch_and_name_every_package() -> None:
    text = gpu_packages("--dry-run")
    assert [line.partition(" (")[0] for line in text.splitlines()] == [
        "transformer-engine", "apex", "flash-attention-3",
    ]  # fmt: skip
    wanted = [line for line in text.splitlines() if "already installed" not in line]
    assert all("--no-build-isolation" in w and "--constraint" in w for w in wanted)


def test_a_gpu_package_that_cannot_be_built_is_no_error(tmp_path: Path) -> None:
    found = gpu_packages("--only", "apex", path=str(tmp_path))
    if "already installed" in found:
        pytest.skip("apex is installed")
    assert found == (
        "apex (fused Adam, accumulation of weight gradients): not installed: its build needs nvcc "
        "on PATH\n"
    )
