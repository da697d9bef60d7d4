"""Everything in the package is reachable: code that only tests use is not a feature."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.reachable import Reachability

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
