"""Settings that name a file, a folder, an artifact or a server: marked in their annotation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal

from nemocascade.recipe.rules import hints_of


@dataclass(frozen=True)
class Names:
    """A setting's value is one name, or a tuple of them; empty = none.

    kind: `input` is read, `artifact` is read as an artifact, `url` is asked, `output` is written.
    """

    kind: Literal["input", "artifact", "url", "output"]


InputPath = Annotated[str, Names("input")]
InputPaths = Annotated[tuple[str, ...], Names("input")]
ArtifactPath = Annotated[str, Names("artifact")]
OutputPath = Annotated[str, Names("output")]
Url = Annotated[str, Names("url")]


def named_paths(settings: Any, kind: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name of a setting and its path, for every path of this kind that a tree of
    settings names. Data that is made from a seed (`synthetic:NAME`) is no path."""
    kind_of: Any = type(settings)
    hints = hints_of(kind_of)
    for field in fields(settings):
        value = getattr(settings, field.name)
        name = f"{prefix}{field.name}"
        marks = getattr(hints[field.name], "__metadata__", ())
        if Names(kind) in marks:  # type: ignore[arg-type]
            values = value if isinstance(value, tuple) else (value,)
            yield from ((name, v) for v in values if v and not v.startswith("synthetic:"))
        elif is_dataclass(value):
            yield from named_paths(value, kind, f"{name}.")
        elif isinstance(value, tuple):
            for number, inner in enumerate(value):
                if is_dataclass(inner):
                    yield from named_paths(inner, kind, f"{name}.{number}.")
