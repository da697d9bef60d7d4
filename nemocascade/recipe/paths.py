"""Settings that name a file, a folder, an artifact or a server: marked in their annotation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from nemocascade.recipe.rules import hints_of


@dataclass(frozen=True)
class Names:
    """A setting's value is one name, or a tuple of them; empty = none.

    kind: `input` is read, `rows` is an input of data files, `artifact` is read as an artifact,
    `url` is asked, `output` is written.
    """

    kind: Literal["input", "rows", "artifact", "url", "output"]


InputPath = Annotated[str, Names("input")]
InputPaths = Annotated[tuple[str, ...], Names("input")]
RowPaths = Annotated[tuple[str, ...], Names("input"), Names("rows")]
ArtifactPath = Annotated[str, Names("artifact")]
OutputPath = Annotated[str, Names("output")]
Url = Annotated[str, Names("url")]
Urls = Annotated[tuple[str, ...], Names("url")]


LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Most bytes of a name and of a path that file systems allow."""


def is_file_name(name: str) -> bool:
    """Return True if `name` can be an entry of a folder: no path, and no name that no file has."""
    plain = Path(name).name == name and name not in ("", ".", "..")
    return plain and 0 < _size(name) <= LONGEST_NAME


def path_problems(settings: Any, prefix: str = "") -> list[str]:
    """Every path in a tree of settings that no file system can have."""
    return [
        f"{name}({path[:80]!r}) is not a path: a name may have {LONGEST_NAME} bytes, a path "
        f"{LONGEST_PATH}, and no character may be NUL"
        for kind in ("input", "artifact", "output")
        for name, path in named_paths(settings, kind, prefix)
        if not 0 < _size(path) <= LONGEST_PATH
        or any(_size(part) > LONGEST_NAME for part in Path(path).parts)
    ]


def _size(path: str) -> int:
    """Bytes of a path; 0 if no file system can have it."""
    try:
        return 0 if "\0" in path else len(os.fsencode(path))
    except UnicodeEncodeError:
        return 0


def named_paths(settings: Any, kind: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name of a setting and its path, for every path of this kind that a tree of
    settings names. Data that is made from a seed (`synthetic:NAME`) is not a path."""
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


def is_url(text: str) -> bool:
    """True for `http://host:port` and the like."""
    try:
        parts = urlsplit(text)
        # The port is parsed here, and may raise ValueError.
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return named and parts.scheme in ("http", "https") and text.isascii() and text.isprintable()
