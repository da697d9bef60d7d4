"""Floors import downwards only, and nobody but nemocascade/megatron opens Megatron-Core's door."""

from __future__ import annotations

import ast
import re
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


CSRC = ROOT / "csrc"
# Modules of the kernel package that an op may import, besides its own folder.
KERNEL_BASE = {"common", "backends", "native", "compile", "testing"}
# Folders of csrc/ without an op: what ops share, and the twin of nemocascade/data/.
NO_OPS = {"common", "packing"}


def kernel_ops() -> list[str]:
    """Every op that has a folder in the kernel package or in csrc/."""
    found = {p.parent.name for p in KERNELS.glob("*/op.py")}
    return sorted(found | {p.name for p in CSRC.iterdir() if p.is_dir()} - NO_OPS)


def test_there_are_kernel_ops() -> None:
    assert kernel_ops()


@pytest.mark.parametrize("op", kernel_ops())
def test_an_op_stands_in_its_five_places(op: str) -> None:
    places = [
        f"kernels/nemocascade_kernels/{op}/op.py",
        f"kernels/nemocascade_kernels/{op}/reference.py",
        f"tests/kernels/test_{op}.py",
        f"benchmarks/kernels/bench_{op}.py",
    ]
    missing = [place for place in places if not (ROOT / place).exists()]
    if f"| `{op}` |" not in (ROOT / "kernels" / "README.md").read_text(encoding="utf-8"):
        missing.append("a row in kernels/README.md")
    assert not missing, f"{op} lacks {missing}"


@pytest.mark.parametrize("path", sources(KERNELS), ids=lambda p: str(p.relative_to(KERNELS)))
def test_an_op_imports_no_other_op(path: Path) -> None:
    """Each op can be read and tested alone; what ops share imports none of them."""
    folder, *inside = path.relative_to(KERNELS).parts
    if not inside:
        return
    named: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "name the module from the package on"
            # `from nemocascade_kernels import x` names x, which may be a module.
            named |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # The modules that an op registers.
            named.add(node.value)
    modules = [name for name in named if re.fullmatch(r"nemocascade_kernels\.[\w.]+", name)]
    parts = {name.split(".")[1] for name in modules}
    assert parts <= KERNEL_BASE | {folder}


@pytest.mark.parametrize(
    "path",
    sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}),
    ids=lambda p: str(p.relative_to(CSRC)),
)
def test_an_op_includes_no_headers_of_another(path: Path) -> None:
    includes = re.findall(r'#include "([^"]+)"', path.read_text(encoding="utf-8"))
    folders = {include.split("/")[0] for include in includes}
    assert folders <= {"common", path.relative_to(CSRC).parts[0]}


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
