"""The build: its sources, its libraries, and the Python that `make setup` finds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nemocascade_kernels
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARIES = {
    "nemocascade": ROOT / "nemocascade" / "_native.so",
    "nemocascade_kernels": ROOT / "kernels" / "nemocascade_kernels" / "_native.so",
}


def test_cmake_lists_every_source_and_only_those() -> None:
    listed = set(re.findall(r"csrc/[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    present = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.cpp", "*.cu")
        for path in (ROOT / "csrc").rglob(pattern)
    }
    assert listed == present


@pytest.mark.parametrize("package", LIBRARIES)
def test_library_says_which_cuda_it_holds_or_why_none(package: str) -> None:
    torch.ops.load_library(LIBRARIES[package])
    built = getattr(torch.ops, package).cuda_built()
    reason = getattr(torch.ops, package).cuda_unavailable_reason()
    assert bool(built) != bool(reason)
    if shutil.which("nvcc") and torch.version.cuda and not os.environ.get("NEMOCASCADE_NO_CUDA"):
        assert built, f"nvcc is here, but {reason}"
        assert re.match(r"\d+\.\d+.* for ", built)


@pytest.mark.parametrize("package", LIBRARIES)
def test_library_uses_only_the_stable_abi(package: str) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    symbols = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", str(LIBRARIES[package])],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "aoti_torch_" in symbols
    foreign = re.findall(r"^\s+U ((?:c10|at|torch)::.*|_?Py\w+)$", symbols, re.MULTILINE)
    assert foreign == []


@pytest.mark.parametrize(
    "command",
    [
        ["setup.py", "--version"],
        ["-m", "nemocascade.cli", "--version"],
        [
            "-c",
            "import nemocascade as n, sys; print(n.__version__); assert 'torch' not in sys.modules",
        ],
    ],
)
def test_there_is_one_version(command: list[str]) -> None:
    """The kernel package's, whoever asks; the third asks without importing torch."""
    found = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert found.split()[-1] == nemocascade_kernels.__version__


def test_documents_name_the_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## \[(\d.*)\] - (.+)$", changes, re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert newest is not None
    assert newest[1] == nemocascade_kernels.__version__
    assert f"\nversion: {newest[1]}\n" in citation
    assert f'\ndate-released: "{newest[2]}"\n' in citation


def fake_python(path: Path, status: int) -> Path:
    """A program that answers find_python.sh as a Python that is fine (0) or not (3, 4, 5)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n[ {status} -eq 0 ] && echo {path}\nexit {status}\n")
    path.chmod(0o755)
    return path


def find_python(home: Path, *folders: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run find_python.sh where it sees nothing but these folders of programs."""
    return subprocess.run(
        ["/bin/sh", str(ROOT / "tools" / "find_python.sh")],
        env={"HOME": str(home), "PATH": os.pathsep.join(map(str, folders)), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_find_python_takes_the_named_one(tmp_path: Path) -> None:
    result = find_python(tmp_path, PYTHON=sys.executable)
    assert result.returncode == 0
    assert Path(result.stdout.strip()).samefile(sys.executable)


@pytest.mark.parametrize(
    ("status", "reason"), [(3, "older than 3.12"), (4, "free-threaded"), (5, "venv and ensurepip")]
)
def test_find_python_says_why_the_named_one_is_no_good(
    tmp_path: Path, status: int, reason: str
) -> None:
    named = fake_python(tmp_path / "python", status)
    result = find_python(tmp_path, PYTHON=str(named))
    assert result.returncode == 1
    assert str(named) in result.stderr
    assert reason in result.stderr


def test_find_python_prefers_312_and_skips_what_does_not_run(tmp_path: Path) -> None:
    fake_python(tmp_path / "one" / "python3.12", 127)
    fake_python(tmp_path / "one" / "python3.13", 0)
    good = fake_python(tmp_path / ".pyenv" / "versions" / "3.12.9" / "bin" / "python", 0)
    assert find_python(tmp_path, tmp_path / "one").stdout.strip() == str(good)


def test_find_python_searches_uv_and_conda(tmp_path: Path) -> None:
    # A real Python of this machine in a usual folder would come first, so the folders are named.
    uv = fake_python(tmp_path / "uv" / "cpython-3.12.4-linux" / "bin" / "python3", 0)
    found = find_python(tmp_path, UV_PYTHON_INSTALL_DIR=str(tmp_path / "uv"))
    assert found.stdout.strip() == str(uv)
    if any(
        Path(folder, f"python3.{minor}").exists()
        for folder in ("/usr/bin", "/usr/local/bin")
        for minor in (12, 13, 14)
    ):
        pytest.skip("this machine has a Python >= 3.12 in a usual folder")
    conda = fake_python(tmp_path / "miniforge3" / "envs" / "x" / "bin" / "python", 0)
    assert find_python(tmp_path).stdout.strip() == str(conda)


def test_find_python_says_what_to_install(tmp_path: Path) -> None:
    old = fake_python(tmp_path / "bin" / "python3", 3)
    result = find_python(tmp_path, old.parent)
    if result.returncode == 0:
        pytest.skip(f"this machine has {result.stdout.strip()} in a usual folder")
    assert result.stdout == ""
    assert "No Python >= 3.12 was found" in result.stderr
    assert "uv python install" in result.stderr


def test_help_and_version_need_no_torch() -> None:
    code = "import sys, nemocascade.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
