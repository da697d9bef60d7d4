"""The wheels: built from the tree, installed into an environment of their own, and used there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = {"nemocascade", "nemocascade_vllm", "kernels", "recipes", "csrc"}
PLACES = {"recipes": "nemocascade/recipe/scripts", "kernels": ""}
"""Folders that stand elsewhere in the wheel."""


def run(*command: object, cwd: Path, **variables: str) -> str:
    """Output of a command that does not see this tree. Its errors fail the test."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd, env=kept | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both wheels by name, with the libraries of csrc/ that are in this tree."""
    folder = tmp_path_factory.mktemp("wheels")
    (folder / "source").mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder / "source")
        elif path.name in TOP:
            kept = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
            shutil.copytree(path, folder / "source" / path.name, ignore=kept)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder / "dist")
    run(*pip, *offline, ".", "./kernels", cwd=folder / "source", NEMOCASCADE_USE_BUILT="1")
    found = {path.name.partition("-")[0]: path for path in (folder / "dist").glob("*.whl")}
    assert sorted(found) == ["nemocascade", "nemocascade_kernels"]
    return found


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment that sees the libraries of this one, but not this tree."""
    folder = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=tmp_path)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def install(environment: Path, wheel: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    named = ("--python", environment / "bin" / "python", "install", "--quiet")
    # The editable install of this tree, which libraries.pth shows, must not count as installed.
    only = ("--no-deps", "--no-index", "--ignore-installed")
    run(*pip, *named, *only, wheel, cwd=environment)


def test_an_installed_wheel_runs_commands_and_recipes(
    wheels: dict[str, Path], environment: Path, tmp_path: Path
) -> None:
    install(environment, wheels["nemocascade"])
    command = environment / "bin" / "nemocascade"
    assert run(command, "--version", cwd=tmp_path).startswith("nemocascade ")
    listed = run(command, "recipes", cwd=tmp_path)
    assert str(environment) in listed
    assert "tiny/sft.py" in listed
    assert f"mine{os.sep}tiny" in run(command, "recipes", "mine", cwd=tmp_path)
    assert (tmp_path / "mine" / "tiny" / "cascade.py").is_file()
    again = subprocess.run(
        [command, "recipes", "mine"], cwd=tmp_path, capture_output=True, text=True
    )
    assert again.returncode == 2
    assert "mine exists" in again.stderr
    assert "stages.sft" in run(command, "run", "mine/tiny/cascade.py", "--help", cwd=tmp_path)


def test_an_installed_wheel_trains(
    wheels: dict[str, Path], environment: Path, tmp_path: Path
) -> None:
    install(environment, wheels["nemocascade"])
    command = environment / "bin" / "nemocascade"
    run(command, "recipes", "mine", cwd=tmp_path)
    small = ("--steps", "1", "--data.capacity", "256", "--data.sequences-per-step", "1",
             "--data.max-rows", "200", "--data.heldout-rows", "8", "--eval.every", "0",
             "--engine.preflight", "False")  # fmt: skip
    run(command, "run", "mine/tiny/sft.py", *small, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert (tmp_path / "runs/tiny/sft/artifact/manifest.json").is_file()


def test_the_kernel_wheel_is_for_every_platform(
    wheels: dict[str, Path], environment: Path, tmp_path: Path
) -> None:
    wheel = wheels["nemocascade_kernels"]
    assert wheel.name.endswith("-py3-none-any.whl")
    install(environment, wheel)
    code = (
        "import nemocascade_kernels as k, torch; "
        "print(k.__file__, k.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5).shape)"
    )
    printed = run(environment / "bin" / "python", "-c", code, cwd=tmp_path)
    assert printed.startswith(str(environment))


def test_the_wheel_holds_what_is_read_at_run_time(wheels: dict[str, Path]) -> None:
    names = set(zipfile.ZipFile(wheels["nemocascade"]).namelist())
    kinds = {".py", ".sbatch", ".jinja", ".css", ".typed", ".json", ".jsonl", ".so"}
    missing = [
        path
        for folder in sorted(TOP - {"csrc"})
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kinds
        and not {"__pycache__", "build"} & set(path.parts)
        and (Path(PLACES.get(folder, folder)) / path.relative_to(ROOT / folder)).as_posix()
        not in names
    ]
    assert not missing, f"add to package_data in setup.py: {missing[:5]}"
