"""Checks of instructions that need a library, or match a row's regular expression."""

from __future__ import annotations

from typing import Any

from nemocascade.envs.instructions import libraries, registry
from nemocascade.envs.instructions.registry import Options

# Imported with this module, because the time limit of a check starts after its imports.
_MISSING = libraries.missing()


def missing() -> dict[str, str]:
    """Return the libraries and data that are not installed, each with its remedy."""
    return _MISSING


def follows(kind: str, arguments: dict[str, Any], text: str, *options: Any) -> bool:
    """Return True if `text` follows an instruction. options: the fields of `Options`."""
    return registry.follows(kind, arguments, text, Options(*options))
