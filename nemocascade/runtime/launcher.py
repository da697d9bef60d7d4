"""The ranks of a job as its launcher names them in the environment. Needs no torch."""

from __future__ import annotations

import os

from nemocascade.recipe import UserError


class MainRankError(RuntimeError):
    """Work that the main rank does for all ranks has failed."""


class LauncherError(UserError, RuntimeError):
    """A launcher started several processes that do not know of each other."""


TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Number of processes, as srun and MPI launchers set it. A batch script or a shell of salloc has
none: SLURM_NTASKS, which they have, counts the tasks of the allocation."""


def world_size_of_environment() -> int:
    """Number of ranks that the launcher (torchrun, srun + torchrun) started; 1 without one.

    Raises LauncherError if a launcher without torchrun started several processes: each would be a
    world of its own, in one run folder.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    for name in TASKS:
        if (count := os.environ.get(name, "1")) != "1":
            raise LauncherError(
                f"{name} is {count}, so {count} processes run this script and none knows of the "
                "others: start one task a node (srun --ntasks-per-node 1) that runs torchrun "
                "--nproc-per-node RANKS, see `nemocascade submit --dry-run`"
            )
    return 1


def local_rank() -> int:
    """Index of this rank on its node; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_of_node(default: int = 1) -> int:
    """Number of ranks on this node; `default` without a launcher that says it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", default))


def is_main_process() -> bool:
    """True in the process that prints a job's output; needs no process group."""
    return os.environ.get("RANK", "0") == "0"
