"""Settings of `nemocascade submit`, and the jobs that it submits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nemocascade.recipe.rules import Count, Natural, Range


@dataclass(frozen=True)
class SubmitSettings:
    """Write and submit a Slurm job for each recipe, and for each stage of a cascade; each starts
    after the one before has succeeded.

    Arguments after `--` go to every recipe."""

    recipes: tyro.conf.Positional[tuple[str, ...]]
    """Recipe scripts, in order."""

    nodes: Count = 1
    ranks_per_node: Count = 8
    """Processes on each node, one for each GPU."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = "24:00:00"
    """Time limit of each job, as Slurm writes it."""

    warning_s: Count = 600
    """Seconds before the time limit at which a checkpoint is requested; must exceed the time of an
    optimizer step and a save. Compared with the steps that the run has measured."""

    spare_nodes: Natural = 0
    """Nodes that the job gets besides `nodes`, to replace those that fail."""

    restarts: Natural = 3
    """Starts in a row that may end without a further step; one more ends the job."""

    pause_s: Count = 10
    """Pause before the first restart in seconds; it doubles with each further one, up to 64 times
    as long."""

    gpus: bool = True
    """Ask Slurm for `ranks_per_node` GPUs on each node."""

    container_image: str = ""
    """Image for Slurm's container plug-in (pyxis); empty = none."""

    container_mounts: str = ""
    """`host:container` pairs of the container, separated by commas."""

    environment: str = ""
    """File of `export` lines that the script sources, for example a site's network settings."""

    srun_options: str = ""
    """Additional options of srun."""

    sbatch_options: tuple[str, ...] = ()
    """Additional `--name=value` options of sbatch."""

    torchrun: str = "torchrun"
    """Command that starts torchrun on each node, for example a virtual environment's."""

    port: Annotated[int, Range(1, 65_535)] = 29500
    servers: Natural = 0
    """Rollout servers, each on a node of its own that the job gets besides `nodes` (a heterogeneous
    job). Stages that generate rollouts use them, and other stages have no such nodes."""

    server_gpus: Count = 8
    """GPUs of a server, over which its model is tensor-parallel."""

    server_model: str = ""
    """Hugging Face folder that the servers start from: the shape, and weights that the stage
    replaces."""

    server_options: str = ""
    """Additional options of `vllm serve`."""

    judge_nodes: Natural = 0
    """Servers of the judge, each on a node of its own, as `servers`."""

    judge_model: str = ""
    """Model of the judge, as vLLM names it: a folder or a hub name."""

    judge_options: str = ""
    """Additional options of `vllm serve` for the judge."""

    worker_nodes: Natural = 0
    """Nodes without GPUs that run programs of verdicts and tools, by Ray: a component of the job
    besides `nodes`. Stages that generate rollouts use them."""

    worker_partition: str = ""
    """Partition of these nodes; empty = `partition`."""

    worker_address: str = ""
    """`host:port` of a Ray cluster that runs already, instead of `worker_nodes`: the job's nodes
    join it without slots."""

    ray: str = "ray"
    """Command of Ray on each node, for example a virtual environment's."""

    ray_port: Annotated[int, Range(1, 65_535)] = 6379
    serve: str = "nemocascade-vllm"
    """Command that starts a server, for example that of an environment with vLLM."""

    template: str = ""
    """Script template to use instead of nemocascade/plan/template.sbatch."""

    after: str = ""
    """Id of a job that the first job waits for."""

    dry_run: bool = False
    """Print the scripts and the commands, and submit nothing."""


@dataclass(frozen=True)
class SlurmJob:
    """Job of one stage: recipe script, run folder and arguments of the recipe.

    settings: prefix of the stage's settings among the arguments, such as `stages.if_rl.`; None for
    a stage without rollouts.
    """

    recipe: Path
    run_dir: Path
    arguments: tuple[str, ...]
    settings: str | None = None

    @property
    def name(self) -> str:
        """Readable name."""
        return f"{self.recipe} ({self.run_dir.name})"
