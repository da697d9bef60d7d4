"""Instruction kinds of IFBench, where a package that holds them is installed.

Known packages keep a registry `INSTRUCTION_DICT` from ids to classes with `build_description` and
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
    """All kinds of the first package that is installed; empty where none is."""
    for name in PACKAGES:
        try:
            return dict(importlib.import_module(name).INSTRUCTION_DICT)
        except ModuleNotFoundError as error:
            # A package that is there but lacks one of its own imports must not pass for absent.
            if error.name is None or name.partition(".")[0] != error.name.partition(".")[0]:
                raise
    return {}


def follows(kind: str, arguments: dict[str, Any], text: str) -> bool:
    """Whether `text` follows an instruction. Raises LookupError for a kind nobody knows."""
    kinds = registry()
    if kind not in kinds:
        raise LookupError(
            f"unknown instruction {kind!r}: it is none of IFEval's, and "
            + ("none of IFBench's" if kinds else f"none of {', '.join(PACKAGES)} is installed")
        )
    instruction = kinds[kind](kind)
    instruction.build_description(**arguments)
    return bool(text.strip()) and bool(instruction.check_following(text))
