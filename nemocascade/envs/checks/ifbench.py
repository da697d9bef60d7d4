"""Instruction kinds of IFBench, available if a package that has them is installed.

Known packages have a registry `INSTRUCTION_DICT` from ids to classes with `build_description` and
`check_following`: `verifiable_instructions` (the one NeMo Gym uses), `ifbench`, and a checkout of
IFBench on the module path.
"""

from __future__ import annotations

import importlib
from typing import Any

PACKAGES = (
    "verifiable_instructions.instructions_registry",
    "ifbench.instructions_registry",
    "instructions_registry",
)


def registry() -> dict[str, Any]:
    """Return all kinds of the first installed package; empty if none is installed."""
    for name in PACKAGES:
        try:
            return dict(importlib.import_module(name).INSTRUCTION_DICT)
        except ModuleNotFoundError as error:
            # A package that fails on one of its own imports is installed but broken: report it.
            if error.name is None or name.partition(".")[0] != error.name.partition(".")[0]:
                raise
    return {}


def kinds() -> list[str]:
    """Return the ids of all kinds."""
    return sorted(registry())


def follows(kind: str, arguments: dict[str, Any], text: str) -> bool:
    """Return True if `text` follows an instruction. Raises LookupError for an unknown kind."""
    kinds = registry()
    if kind not in kinds:
        raise LookupError(
            f"unknown instruction {kind!r}: it is none of IFEval's, and "
            + ("none of IFBench's" if kinds else f"none of {', '.join(PACKAGES)} is installed")
        )
    instruction = kinds[kind](kind)
    instruction.build_description(**arguments)
    return bool(text.strip()) and bool(instruction.check_following(text))
