"""What every job checks of itself when it starts: before it joins the others, and with them."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import psutil
import torch

from nemocascade.plan.errors import PlanError
from nemocascade.plan.gpus import GPUS, Gpu
from nemocascade.plan.job import Job, job_of_recipe
from nemocascade.plan.memory import GIB
from nemocascade.plan.preflight import (
    Preflight,
    check_disk,
    check_files,
    check_memory,
    check_settings,
    online,
)
from nemocascade.runtime.world import World


def this_gpu() -> Gpu:
    """The device of this machine, as the table knows it, with its true memory.

    An accelerator that is not in the table keeps its name, and plans with the ceilings of the
    slowest one that is. A CPU's memory is shared by the ranks of the node.
    """
    if not torch.cuda.is_available():
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        memory = psutil.virtual_memory().total / GIB / ranks
        return dataclasses.replace(GPUS["cpu"], memory_gib=memory)
    properties = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
    name = properties.name.lower()
    unknown = dataclasses.replace(GPUS["a100-80gb"], name=name)
    known = next((g for key, g in GPUS.items() if key.split("-")[0] in name), unknown)
    return dataclasses.replace(known, memory_gib=properties.total_memory / GIB)


def job_here(recipe: Any, world_size: int) -> Job | None:
    """The recipe on this machine; None where its model is not known before it is read."""
    try:
        return job_of_recipe(recipe, this_gpu(), world_size)
    except PlanError:
        return None


def problems_before(recipe: Any, world_size: int) -> list[str]:
    """What is wrong with a job that has not joined the others yet, all at once."""
    found = Preflight()
    check_settings(recipe, world_size, found)
    check_files(recipe, found)
    job = None if found.problems else job_here(recipe, world_size)
    if job is not None:
        check_disk(job, recipe, found)
        check_memory(job, found)
    return found.problems


def check_together(recipe: Any, world: World) -> Preflight:
    """Devices and collectives, on all ranks."""
    job = job_here(recipe, world.size)
    return Preflight() if job is None else online(world, job)
