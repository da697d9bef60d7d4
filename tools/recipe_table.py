"""Print the 30B recipes beside the paper's settings, into docs/recipes.md.

python tools/recipe_table.py           # write the table
python tools/recipe_table.py --check   # exit code 1 if the page is not up to date
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipe_facts import FACTS, Fact

from nemocascade.recipe import load_any_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipes.md"
SCRIPTS = ROOT / "recipes" / "nemotron3_nano_30b"
BEGIN, END = "<!-- table: tools/recipe_table.py -->\n", "<!-- end of the table -->\n"


def ours(recipe: Any, setting: str) -> Any:
    """The value of a recipe's setting. A list of domains or teachers is indexed by domain.

    Raises AttributeError or KeyError for a name that the recipe does not have.
    """
    value = recipe
    for name in setting.split("."):
        if isinstance(value, tuple):
            value = {entry.domain: entry for entry in value}[name]
        else:
            value = getattr(value, name)
    return value


def differences() -> Iterator[str]:
    """Facts that a recipe breaks without a reason, and reasons for no difference."""
    for fact, value in values():
        if value != fact.value and not fact.why:
            yield f"{fact.script}.{fact.setting} is {value!r}, {fact.place} says {fact.value!r}"
        if value == fact.value and fact.why:
            yield f"{fact.script}.{fact.setting} is {value!r} as in {fact.place}: drop the reason"


def values() -> list[tuple[Fact, Any]]:
    """Every fact with our value."""
    recipes = {name: load_any_recipe(SCRIPTS / f"{name}.py") for name in {f.script for f in FACTS}}
    return [(fact, ours(recipes[fact.script], fact.setting)) for fact in FACTS]


def table() -> str:
    """The table of every stage, as Markdown."""
    lines: list[str] = []
    last = ""
    for fact, value in values():
        if fact.script != last:
            last = fact.script
            lines += [
                f"\n### `{last}.py`\n",
                "| setting | paper | place | ours |",
                "|---|---|---|---|",
            ]
        said = f"{shown(value)}: {fact.why}" if fact.why else shown(value)
        lines.append(f"| `{fact.setting}` | {fact.paper} | {fact.place} | {said} |")
    return "\n".join(lines) + "\n\n"


def shown(value: Any) -> str:
    """A setting's value as Markdown."""
    if isinstance(value, tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else f"`{value}`"


def page() -> str:
    """The page with the table as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


def main() -> int:
    """Write or check the page. Returns the exit code."""
    found = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(found, encoding="utf-8")
        return 0
    return int(found != PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
