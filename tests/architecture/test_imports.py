"""Floors import downwards only, and only nemocascade/megatron imports Megatron-Core."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.imports import (
    KERNELS,
    PACKAGE,
    ROOT,
    import_graph,
    imports_of,
    loaded_with,
    shortest_circle,
    sources,
)

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
    "serving": {"stages", "rollout", "envs", "data", "megatron", "types", "recipe", "runtime"},
    "cascade": {"stages", "plan", "data", "megatron", "recipe", "types", "runtime"},
}  # fmt: skip
# Floors inside a room, lowest first. A file imports files of lower floors, and of its own floor
# those of its own entry only. An entry is a file or a folder.
FLOORS = {
    "megatron": [
        "upstream cpu init replay workspace groups context distillation",
        "world config microbatch",
        "layers",
        "model schedule parameter_gather adam user_buffers",
        "optimizer parameters fake generation",
        "checkpoint",
        "adapter",
        "artifact replica products",
        "adapter_artifact",
        "convert accelerators",
        "warm_up",
    ],
    "rollout": [
        "engine blocks",
        "sampling stops replies intake completions servers capacity",
        "slots",
        "residency",
        "prefill_queue",
        "generation server_calls flight",
        "live transfer",
        "weight_updates",
        "server",
        "factory",
    ],
    "train": [
        "dump flops garbage lead_time objectives progress stragglers trackers weight_swap",
        "evaluation",
        "trainer",
        "metrics",
        "checkpointing",
    ],
}
KERNEL_LIBRARIES = {"torch", "triton", "nemocascade_kernels"}
# Optional packages, imported inside functions of these files alone.
KERNEL_OPTIONS = {"mamba2/fla_check.py": {"fla"}}


def room_of(module: str) -> str | None:
    """The room a module stands in; None for libraries."""
    parts = module.split(".")
    if parts[0] == "nemocascade_kernels":
        return "kernels"
    if parts[0] == "nemocascade" and len(parts) > 1:
        return parts[1]
    return None


def test_imports_go_down_only() -> None:
    wrong = []
    for path in sources(PACKAGE):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in ("cli", "__init__", "_version"):
            continue
        assert room in ALLOWED, f"{room} is a room that the house does not know"
        named = (room_of(f"{a}.{b}".strip(".")) for a, b in imports_of(path))
        forbidden = {r for r in named if r is not None} - ALLOWED[room] - {room}
        wrong += [f"{path.relative_to(ROOT)}: {room} may not import {r}" for r in forbidden]
    assert not wrong, "\n".join(sorted(wrong))


def entry_of(module: str, room: str) -> str | None:
    """The entry of FLOORS that a module of the room belongs to; None for the room itself."""
    parts = module.split(".")[2:]
    names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    entries = " ".join(FLOORS[room]).split()
    found = next((name for name in names if name in entries), None)
    assert found or not parts, f"{module} stands on no floor: give it one in FLOORS"
    return found


@pytest.mark.parametrize("room", FLOORS)
def test_floors_inside_a_room(room: str) -> None:
    floor = {entry: i for i, line in enumerate(FLOORS[room]) for entry in line.split()}
    upward, here = [], f"nemocascade.{room}"
    graph = {m: t for m, t in import_graph().items() if m == here or m.startswith(f"{here}.")}
    entries = {module: entry_of(module, room) for module in graph}
    for module, targets in graph.items():
        for target in sorted(targets & graph.keys()):
            own, other = entries[module], entries[target]
            if own and own != other and (other is None or floor[other] >= floor[own]):
                upward.append(f"{module} imports {target}")
    assert not upward, f"imports that do not go down: {upward}"
    gone = floor.keys() - entries.values()
    assert not gone, f"FLOORS names {sorted(gone)}, which {room} does not have"


def test_no_file_imports_itself_through_others() -> None:
    circle = shortest_circle(import_graph())
    assert not circle, "a circle of imports: " + " -> ".join(circle)


def test_a_circle_is_found_and_named() -> None:
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": {"d"}, "d": {"b"}, "e": {"a"}}
    assert shortest_circle(graph) == ["b", "c", "d", "b"]
    assert shortest_circle(graph | {"d": set()}) == []


def test_only_the_megatron_room_imports_megatron() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {a}"
        for path in sources(PACKAGE)
        if not path.is_relative_to(PACKAGE / "megatron")
        for a, _ in sorted(imports_of(path))
        if a.split(".")[0] == "megatron"
    ]
    assert not wrong, f"reach Megatron-Core through nemocascade.megatron: {wrong}"


def test_a_plan_does_not_load_megatron_core() -> None:
    """It takes as long to import as all layouts of 1,024 ranks take to price."""
    assert "megatron.core" in loaded_with("nemocascade.megatron.model")
    loaded = loaded_with("nemocascade.plan.summary")
    assert "nemocascade.plan.timing" in loaded
    assert "megatron.core" not in loaded, " -> ".join(loaded["megatron.core"])


def test_ray_is_imported_in_functions_of_two_files() -> None:
    """Nothing of training runs on Ray, and without it everything else works."""

    def imports_ray(nodes: Sequence[ast.AST]) -> bool:
        named = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
        named += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        return any(name.partition(".")[0] == "ray" for name in named)

    doors = {PACKAGE / "runtime" / name for name in ("ray_cluster.py", "ray_description.py")}
    wrong = []
    for path in sources(PACKAGE):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if imports_ray(tree.body if path in doors else list(ast.walk(tree))):
            wrong.append(str(path.relative_to(ROOT)))
    assert not wrong, f"reach Ray through runtime/ray_cluster.py, in functions: {wrong}"


def test_the_plugin_of_vllm_is_alone() -> None:
    """It is installed beside vLLM, without the package; and the package, without vLLM, shares the
    plugin's protocol."""
    plugin = ROOT / "nemocascade_vllm"
    users = {
        str(path.relative_to(ROOT)): named
        for path in sources(PACKAGE) + sources(KERNELS)
        if (named := {a for a, _ in imports_of(path) if a.split(".")[0] == plugin.name})
    }
    assert users == {"nemocascade/rollout/transfer.py": {"nemocascade_vllm.link"}}
    for path in sources(plugin):
        roots = {a.split(".")[0] for a, _ in imports_of(path)}
        assert not roots & {"nemocascade", "nemocascade_kernels", "megatron"}, path.name
        if path.name == "link.py":
            assert roots <= {"torch", *sys.stdlib_module_names}, roots


def test_kernels_need_torch_and_triton_only() -> None:
    wrong = []
    for path in sources(KERNELS):
        name = str(path.relative_to(KERNELS))
        roots = {a.split(".")[0] for a, _ in imports_of(path)}
        options = KERNEL_OPTIONS.get(name, set())
        others = roots - KERNEL_LIBRARIES - options - set(sys.stdlib_module_names)
        wrong += [f"{name} may import torch and triton, not {o}" for o in sorted(others)]
        top = ast.parse(path.read_text(encoding="utf-8")).body
        first = {n.module.split(".")[0] for n in top if isinstance(n, ast.ImportFrom) and n.module}
        wrong += [f"{name}: import {o} where it is used" for o in sorted(first & options)]
    assert not wrong, "\n".join(wrong)


CSRC = ROOT / "csrc"
# Modules of the kernel package that an op may import, besides its own folder.
KERNEL_BASE = {"common", "backends", "native", "compile", "testing", "version"}
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


def test_an_op_imports_no_other_op() -> None:
    """Each op can be read and tested alone; what ops share imports none of them."""
    wrong = []
    for path in sources(KERNELS):
        folder, *inside = path.relative_to(KERNELS).parts
        if inside:
            others = kernel_parts_of(path) - KERNEL_BASE - {folder}
            wrong += [f"{path.relative_to(KERNELS)} imports {o}" for o in sorted(others)]
    assert not wrong, "\n".join(wrong)


def kernel_parts_of(path: Path) -> set[str]:
    """Folders and modules of the kernel package that a file names."""
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
    return {name.split(".")[1] for name in modules}


def test_an_op_includes_no_headers_of_another() -> None:
    wrong = []
    for path in CSRC.rglob("*"):
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"}:
            includes = re.findall(r'#include "([^"]+)"', path.read_text(encoding="utf-8"))
            folders = {include.split("/")[0] for include in includes}
            others = folders - {"common", path.relative_to(CSRC).parts[0]}
            wrong += [f"{path.relative_to(CSRC)} includes {o}" for o in sorted(others)]
    assert not wrong, "\n".join(sorted(wrong))


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
