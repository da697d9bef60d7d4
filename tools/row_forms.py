"""Writes docs/your_data.md: every form of rows that the environments read, from their code.

python tools/row_forms.py > docs/your_data.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nemocascade.envs.registry import make_environments
from nemocascade.envs.row_forms import EVERY_ROW, RowForm

HEAD = """# Rows of your data

An environment reads its tasks from data files whose rows have the fields below. `a.b` is the
field `b` inside of the field `a`. A field may also stand inside of `verifier_metadata`.

- A field in no table is named once for a path, with a count: it may be meant to change a verdict.
- A field that is null or empty counts as missing.
- A row that cannot be verified as it asks is refused, with its file, its number and the reason.

This page is written by `python tools/row_forms.py > docs/your_data.md`."""


def page() -> str:
    """Return the page as Markdown."""
    parts = [HEAD, *section("Every environment", [EVERY_ROW])]
    for domain, environment in make_environments().items():
        parts += section(f"`{domain}`", environment.row_forms)
    return "\n".join(parts) + "\n"


def section(title: str, forms: tuple[RowForm, ...] | list[RowForm]) -> Iterator[str]:
    """Yield a heading and a table for each form."""
    yield f"\n## {title}"
    for form in forms:
        yield f"\n{form.name[0].upper()}{form.name[1:]}:\n"
        yield "| field | use | what is done with it |\n|---|---|---|"
        for use, fields in (
            ("read", form.read),
            ("refused", form.refused),
            ("ignored", form.ignored),
        ):
            yield from lines(use, fields)


def lines(use: str, fields: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of a table; fields of which the same is said share one."""
    names: dict[str, list[str]] = {}
    for name, text in fields.items():
        names.setdefault(text, []).append(f"`{name}`")
    for text, found in names.items():
        yield f"| {', '.join(found)} | {use} | {text} |"


if __name__ == "__main__":
    print(page(), end="")
