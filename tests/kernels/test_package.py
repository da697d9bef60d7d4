"""The kernel package, built and installed alone, gives the first result of its README."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
# No path of this checkout: its packages are importable by an editable install.
ALONE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
others = [p for p in sys.path if not p.startswith(sys.argv[2]) or "site-packages" in p]
sys.path[:] = [sys.argv[1], *others]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the wheel of `kernels/` is unpacked."""
    folder = tmp_path_factory.mktemp("kernels")
    without_builds = shutil.ignore_patterns("*.so", "__pycache__", "build", "*.egg-info")
    shutil.copytree(KERNELS, folder / "source", ignore=without_builds)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*pip, "--disable-pip-version-check", "-w", str(folder), str(folder / "source")],
        check=True,
    )
    [wheel] = folder.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "alone")
    return folder / "alone"


def run_alone(installed: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ALONE + code, str(installed), str(KERNELS.parent)],
        cwd=installed,
        env={"PATH": "/usr/bin:/bin", "HOME": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_first_result_of_the_readme(installed: Path) -> None:
    text = (KERNELS / "README.md").read_text(encoding="utf-8")
    match = re.search(r"```python\n(import torch\n.*?)```", text, re.DOTALL)
    assert match is not None
    shown = run_alone(
        installed,
        "import nemocascade_kernels\n"
        "print(nemocascade_kernels.__file__)\n"
        "imported = {name.partition('.')[0] for name in sys.modules}\n"
        "print('needs', sorted(imported & {'megatron', 'nemocascade', 'tyro'}))\n" + match[1],
    )
    assert str(installed) in shown
    assert "needs []" in shown
    assert re.search(r"loss \d+\.\d{3}, entropy \d+\.\d{3}\n", shown)
    assert "linear_policy_loss" in shown


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_are_compiled_from_the_wheel(installed: Path) -> None:
    shown = run_alone(
        installed,
        "from nemocascade_kernels import compile\n"
        "sys.exit(compile.main(['--arch', 'sm_90', '--op', 'mopd_advantage']))",
    )
    assert "sm_90: 2 kernels, 0 with faults" in shown
