"""Installs the optional packages of a GPU node: `make setup GPU=1`.

Each is built from source against the installed torch, which it must not replace. None is required:
one that cannot be installed is named with its reason, and every stage prints what it uses instead.

    python tools/gpu_packages.py [--dry-run] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

PINNED = ("torch", "triton", "megatron-core", "numpy")
"""Packages whose versions stay as they are."""


@dataclass(frozen=True)
class Package:
    """An optional package. module: shows that it is installed. environment: of its build."""

    name: str
    module: str
    requirement: str
    use: str
    environment: dict[str, str] = field(default_factory=dict)


PACKAGES = (
    Package(
        "transformer-engine",
        "transformer_engine",
        "transformer_engine[pytorch]>=2.3",
        "fused Adam, attention, FP8 linear layers",
    ),
    Package(
        "apex",
        "apex",
        "apex @ git+https://github.com/NVIDIA/apex",
        "fused Adam, accumulation of weight gradients",
        {"APEX_CPP_EXT": "1", "APEX_CUDA_EXT": "1"},
    ),
    Package(
        "flash-attention-3",
        "flash_attn_interface",
        "flash_attn_3 @ git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper",
        "attention on Hopper GPUs",
    ),
)


def command_of(package: Package, constraints: Path) -> list[str]:
    """The command that installs a package beside the pinned ones."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    return [*pip, "--no-build-isolation", "--constraint", str(constraints), package.requirement]


def pins() -> Iterator[str]:
    """Constraints of the installed versions."""
    for name in PINNED:
        if importlib.util.find_spec(name.replace("-core", ".core")) is not None:
            yield f"{name}=={version(name).partition('+')[0]}"


def install(package: Package, constraints: Path, *, dry_run: bool) -> str:
    """Install a package unless it is there; returns what became of it."""
    if importlib.util.find_spec(package.module) is not None:
        return "already installed"
    command = command_of(package, constraints)
    if dry_run:
        return shlex.join([*(f"{k}={v}" for k, v in package.environment.items()), *command])
    if shutil.which("nvcc") is None:
        return "not installed: its build needs nvcc on PATH"
    done = subprocess.run(
        command, env=os.environ | package.environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"not installed: {reason}"
    return "installed"


def main() -> None:
    """Install the packages, and print a line for each. The exit code is 0 whatever is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    names = [package.name for package in PACKAGES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("".join(f"{pin}\n" for pin in pins()))
        for package in PACKAGES:
            if package.name in options.only:
                found = install(package, constraints, dry_run=options.dry_run)
                print(f"{package.name} ({package.use}): {found}", flush=True)


if __name__ == "__main__":
    main()
