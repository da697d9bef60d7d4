"""Everything in the package is reachable: code that only tests use is not a feature."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from helpers.reachable import Reachability
from helpers.unused_methods import unused_methods

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nemocascade"

STARTED = ("nemocascade.sandbox.inside.zygote:main",)
"""Started by a text that is handed to an interpreter, `sandbox/launch.py`."""


def graph() -> Reachability:
    return Reachability(PACKAGE, without=[PACKAGE / "swe" / "repositories"])


def scripts() -> list[Path]:
    return sorted((ROOT / "recipes").rglob("*.py"))


def test_everything_public_is_used_by_a_recipe_or_a_command() -> None:
    unused = graph().unreachable(scripts(), STARTED)
    assert not unused, f"used by tests alone, or by nobody: {', '.join(unused)}"


def test_every_public_method_is_named_outside_of_tests() -> None:
    packages = [PACKAGE, ROOT / "kernels" / "nemocascade_kernels", ROOT / "nemocascade_vllm"]
    users = [ROOT / name for name in ("benchmarks", "recipes", "tools")]
    unused = unused_methods(packages, users)
    assert not unused, f"used by tests alone, or by nobody: {', '.join(unused)}"


FILES = {
    "house/__init__.py": "from house.parts import Door as Door",
    "house/cli.py": """
        import house.kitchen
        from house import rooms
        def main():
            from house.cellar import wine
            wine()
            rooms.call("house.checks:equal", "from house.checks import serve; serve()")
            house.kitchen.cook(view=rooms)
        if __name__ == "__main__":
            main()
        """,
    "house/parts.py": """
        class Door: pass
        class Window(Frame): pass
        class Frame: pass
        def _private(): pass
        """,
    "house/rooms.py": """
        def call(*names): return [helper(name) for name in names]
        def helper(name: "str") -> None: pass
        def only_passed_along(): pass
        """,
    "house/kitchen.py": """
        from . import stove
        def cook(view): return stove.HEAT[view]()
        """,
    "house/stove.py": """
        def fry(): pass
        def boil(): pass
        def bake(): return bake()
        HEAT = {"fry": fry, "boil": boil}
        """,
    "house/cellar.py": """
        from house.types import Bottle, label
        @label
        def wine() -> Bottle: pass
        def alone(): return other_alone()
        def other_alone(): return alone()
        """,
    "house/types.py": """
        def label(function): return function
        class Base: pass
        class Bottle(Base):
            cork: Cork
        class Cork: pass
        """,
    "house/checks.py": """
        def equal(): pass
        def serve(): pass
        def unequal(): pass
        """,
    "house/attic.py": """
        from house.parts import Window
        def dust(): return Window()
        """,
}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        lines = [line.removeprefix(" " * 8) for line in text.strip("\n").split("\n")]
        path.write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "house"


def test_the_finder_names_what_no_entry_reaches(house: Path) -> None:
    assert Reachability(house).unreachable([]) == [
        "house.attic:dust",
        "house.cellar:alone",
        "house.cellar:other_alone",
        "house.checks:unequal",
        "house.parts:Door",
        "house.parts:Frame",
        "house.parts:Window",
        "house.stove:bake",
    ]


def test_scripts_and_entries_reach_more(house: Path, tmp_path: Path) -> None:
    script = tmp_path / "recipe.py"
    script.write_text("import house\nprint(house.Door)\n", encoding="utf-8")
    found = Reachability(house).unreachable([script], ["house.attic:dust"])
    assert found == [
        "house.cellar:alone",
        "house.cellar:other_alone",
        "house.checks:unequal",
        "house.stove:bake",
    ]


METHODS = """
    class Door(Frame):
        def open(self): self.creak()
        def creak(self): pass
        def shut(self): self.shut_at = 0
        @property
        def width(self): pass
        @tool
        def lock(self): pass
        def _private(self): pass
    class Frame(Protocol[T]):
        def paint(self): pass
    class Visitor(ast.NodeVisitor):
        def visit_Name(self): pass
    class Guest(Visitor):
        def visit_Call(self): pass
    class Hooks:
        def pytest_collection_finish(self): pass
        def ring(self): call("ring")
    """


def test_the_finder_names_methods_that_nobody_names(tmp_path: Path) -> None:
    house, users = tmp_path / "house", tmp_path / "users"
    for folder, text in ((house, METHODS), (users, "door.open()")):
        folder.mkdir()
        (folder / "all.py").write_text(textwrap.dedent(text), encoding="utf-8")
    found = ["Door.open", "Door.shut", "Door.width", "Frame.paint"]
    assert unused_methods([house]) == found
    assert unused_methods([house], [users]) == found[1:]
