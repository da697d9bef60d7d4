"""Floors import downwards only, and nobody but nemocascade/megatron opens Megatron-Core's door."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nemocascade"
KERNELS = ROOT / "kernels" / "nemocascade_kernels"

# Which rooms a room may import, besides itself and libraries.
ALLOWED = {
    "types": set(),
    "recipe": set(),
    "runtime": {"recipe", "types"},
    "megatron": {"kernels", "recipe", "types", "runtime"},
    "data": {"types", "recipe", "runtime"},
    "sandbox": {"types", "recipe", "runtime"},
    "judges": {"types", "recipe", "runtime"},
    "swe": {"types", "recipe", "runtime"},
    "envs": {"types", "recipe", "runtime", "judges", "sandbox", "swe"},
    "rollout": {"megatron", "types", "recipe", "runtime"},
    "train": {"megatron", "kernels", "data", "types", "recipe", "runtime"},
    "rl": {"rollout", "envs", "data", "train", "types", "recipe", "runtime"},
    "plan": {"megatron", "train", "data", "types", "recipe", "runtime"},
    "stages": {
        "rl", "train", "rollout", "envs", "data", "plan", "megatron", "types", "recipe", "runtime",
    },
    "cascade": {"stages", "plan", "megatron", "recipe", "types", "runtime"},
}  # fmt: skip
KERNEL_LIBRARIES = {"torch", "triton", "nemocascade_kernels"}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


def room_of(module: str) -> str | None:
    """The room a module stands in; None for libraries."""
    parts = module.split(".")
    if parts[0] == "nemocascade_kernels":
        return "kernels"
    if parts[0] == "nemocascade" and len(parts) > 1:
        return parts[1]
    return None


def sources(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in ("cli", "__init__", "_version"):
        return
    assert room in ALLOWED, f"{room} is a room that the house does not know"
    rooms = {r for m in imported_modules(path) if (r := room_of(m)) is not None}
    forbidden = rooms - ALLOWED[room] - {room}
    assert not forbidden, f"{room} may not import {sorted(forbidden)}"


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_megatron_room_imports_megatron(path: Path) -> None:
    if path.is_relative_to(PACKAGE / "megatron"):
        return
    outside = {m for m in imported_modules(path) if m.split(".")[0] == "megatron"}
    assert not outside, f"reach Megatron-Core through nemocascade.megatron, not {sorted(outside)}"


@pytest.mark.parametrize("path", sources(KERNELS), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_need_torch_and_triton_only(path: Path) -> None:
    import sys

    roots = {m.split(".")[0] for m in imported_modules(path)}
    others = roots - KERNEL_LIBRARIES - set(sys.stdlib_module_names)
    assert not others, f"the kernel package may import torch and triton, not {sorted(others)}"


def kernel_ops() -> list[str]:
    return sorted(p.parent.name for p in KERNELS.glob("*/op.py"))


def test_there_are_kernel_ops() -> None:
    assert kernel_ops()


@pytest.mark.parametrize("op", kernel_ops())
def test_an_op_stands_in_its_five_places(op: str) -> None:
    table = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    places = {
        f"kernels/nemocascade_kernels/{op}/reference.py": (KERNELS / op / "reference.py").exists(),
        f"tests/kernels/test_{op}.py": (ROOT / "tests/kernels" / f"test_{op}.py").exists(),
        f"benchmarks/kernels/bench_{op}.py": (
            ROOT / "benchmarks/kernels" / f"bench_{op}.py"
        ).exists(),
        "a row in kernels/README.md": f"`{op}`" in table,
    }
    missing = [place for place, there in places.items() if not there]
    assert not missing, f"{op} lacks {missing}"


def test_files_stay_small() -> None:
    """A file over 600 lines is a redesign waiting."""
    code = [
        p
        for folder in ("nemocascade", "kernels", "csrc", "recipes", "benchmarks", "tests")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in {".py", ".cpp", ".cu", ".cuh", ".h"} and "__pycache__" not in p.parts
    ]
    long = {
        str(p.relative_to(ROOT)): n for p in code if (n := len(p.read_text().splitlines())) > 600
    }
    assert not long


def test_kernels_folder_is_no_package() -> None:
    """A top-level module `kernels` would hide a published package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_folder_of_code_is_a_package() -> None:
    """A folder without `__init__.py` is not installed."""
    folders = {path.parent for path in (*sources(PACKAGE), *sources(KERNELS))}
    data = PACKAGE / "swe" / "repositories"
    bare = [
        folder.relative_to(ROOT).as_posix()
        for folder in folders
        if not folder.is_relative_to(data) and not (folder / "__init__.py").exists()
    ]
    assert not bare, f"add __init__.py to {sorted(bare)}"
