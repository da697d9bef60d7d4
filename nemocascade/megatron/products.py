"""The ways of bf16 products on CPUs, the same on all ranks of a job and in a resumed run.

Ways differ in their last bits and in their speed; see `nemocascade_kernels`'s
common/products.py. The main rank chooses, and the run folder keeps the choice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemocascade_kernels.common import products

from nemocascade.recipe import EngineConfig, RecipeError
from nemocascade.runtime.files import write_text
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.world import World, main_first

FILE = "bf16_products.json"
"""File of the chosen ways in the run folder."""


def settle_products(run_dir: Path, world: World, engine: EngineConfig, *, keeps: bool) -> None:
    """Choose the ways of a CPU run in bf16 and use them on every rank; nothing to do for others.

    A way is that of the variable NEMOCASCADE_BF16_PRODUCTS, of the run folder, or the fastest on
    the main rank's machine. One that a rank does not have is replaced. keeps: write the run
    folder's file.

    Raises RecipeError if the variable names a way that is unavailable.
    """
    if world.device.type != "cpu" or engine.precision != "bf16":
        return
    path = run_dir / FILE
    chosen: dict[str, dict[str, Any]] = {}
    main_first(world, lambda: chosen.update(_choose(path)), lambda: None)
    chosen = world.broadcast_object(chosen)
    offers = world.all_gather_object({kind: products.available(kind) for kind in products.WAYS})
    for kind, ways in products.WAYS.items():
        found = chosen[kind]
        common = [way for way in ways if all(way in offer[kind] for offer in offers)]
        if found["way"] not in common:
            LOGGER.warning(
                "bf16 %s: %s (%s) is unavailable on some ranks, %s is used: their last bits differ",
                *(kind, found["way"], found["source"], common[0]),
            )
            found.update(way=common[0], source="available on all ranks", seconds={})
        products.use(kind, **found)
    kept = {kind: found["way"] for kind, found in chosen.items()}
    if keeps and world.is_main and _kept(path) != kept:
        write_text(path, json.dumps(kept) + "\n")


def _choose(path: Path) -> dict[str, dict[str, Any]]:
    """By kind, the main rank's way, where it is from, and the measured seconds."""
    kept, chosen = _kept(path), {}
    for kind in products.WAYS:
        before = kept.get(kind)
        try:
            named = products.named_way(kind)
            if before is not None and named in (None, before):
                chosen[kind] = {"way": before, "source": str(path), "seconds": {}}
                continue
            found = products.choice(kind)
        except ValueError as error:
            raise RecipeError([str(error)]) from None
        if before is not None:
            LOGGER.warning(
                "bf16 %s: %s (%s) instead of the %s that the run began with: their bits change",
                *(kind, found.way, found.source, before),
            )
        seconds = dict(found.seconds)
        chosen[kind] = {"way": found.way, "source": found.source, "seconds": seconds}
    return chosen


def _kept(path: Path) -> dict[str, str]:
    """The ways in the run folder's file by kind; empty without one. Damage is reported."""
    if not path.exists():
        return {}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if all(read[kind] in ways for kind, ways in products.WAYS.items()):
            return {kind: read[kind] for kind in products.WAYS}
        reason: object = f"it holds {read}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error
    LOGGER.warning("%s cannot be read (%s): the ways are chosen anew", path, reason)
    return {}
