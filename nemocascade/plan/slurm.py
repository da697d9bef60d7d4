"""Slurm jobs of recipes: one sbatch script a stage, each dependent on the one before.

    nemocascade submit sft.py grpo.py --nodes 32 --partition gpu --time 24:00:00

The script comes from a template, which a site may replace. Before the time limit Slurm signals the
batch shell, which creates the file RUN/stop. The ranks save a checkpoint at the end of the step,
and the job requeues itself. A run resumes from its newest checkpoint without further settings.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nemocascade.plan.errors import PlanError
from nemocascade.recipe.rules import Count, Range, number_problems

TEMPLATE = Path(__file__).with_name("template.sbatch")
COPIED = ("nodes", "ranks_per_node", "time", "warning_s", "torchrun", "port")
"""Settings that the template uses by their own names."""
STOPPED = 75
"""Exit code of ranks that saved a checkpoint and stopped on request: EX_TEMPFAIL, try again."""


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
    """Seconds before the time limit at which a checkpoint is requested; must exceed the time of a
    step and a save."""

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
    template: str = ""
    """Script template to use instead of nemocascade/plan/template.sbatch."""

    after: str = ""
    """Id of a job that the first job waits for."""

    dry_run: bool = False
    """Print the scripts and the commands, and submit nothing."""


@dataclass(frozen=True)
class SlurmJob:
    """Job of one stage: recipe script, run folder and arguments of the recipe."""

    recipe: Path
    run_dir: Path
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """Readable name."""
        return f"{self.recipe} ({self.run_dir.name})"


def check_submission(settings: SubmitSettings, arguments: Sequence[str]) -> None:
    """Raises PlanError listing all invalid settings."""
    problems = []
    if not settings.recipes:
        problems.append("no recipe: name at least one script")
    problems += number_problems(settings)
    problems += [f"{r} is no file" for r in settings.recipes if not Path(r).is_file()]
    if len(settings.recipes) > 1 and any(a.startswith("--run-dir") for a in arguments):
        problems.append("--run-dir with several recipes: they would share one folder")
    if problems:
        raise PlanError("; ".join(problems))


def job_of_script(script: Path, run_dir: str, arguments: Sequence[str]) -> SlurmJob:
    """The job of a recipe script. run_dir: the recipe's own, unless the arguments override it."""
    for index, argument in enumerate(arguments):
        if argument == "--run-dir" and index + 1 < len(arguments):
            run_dir = arguments[index + 1]
        elif argument.startswith("--run-dir="):
            run_dir = argument.partition("=")[2]
    return SlurmJob(script, Path.cwd() / run_dir, tuple(arguments))


def job_script(settings: SubmitSettings, job: SlurmJob) -> str:
    """The sbatch script of a job."""
    container = ""
    if settings.container_image:
        container = f"--container-image={shlex.quote(settings.container_image)} "
        if settings.container_mounts:
            container += f"--container-mounts={shlex.quote(settings.container_mounts)} "
    template = Path(settings.template or TEMPLATE).read_text(encoding="utf-8")
    return template.format(
        job_name=f"nemocascade-{job.run_dir.name}",
        **{name: getattr(settings, name) for name in COPIED},
        log=job.run_dir / "slurm-%j.txt",
        options="".join(f"#SBATCH {o}\n" for o in _options(settings)),
        recipe=shlex.quote(str(job.recipe)),
        run_dir=shlex.quote(str(job.run_dir)),
        again=STOPPED,
        environment=f". {shlex.quote(settings.environment)}" if settings.environment else "",
        srun_options=f"{settings.srun_options} " if settings.srun_options else "",
        container=container,
        arguments=shlex.join(job.arguments),
    )


def _options(settings: SubmitSettings) -> list[str]:
    named = {
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "gpus-per-node": str(settings.ranks_per_node) if settings.gpus else "",
    }
    return [f"--{name}={value}" for name, value in named.items() if value] + list(
        settings.sbatch_options
    )


def submit_jobs(settings: SubmitSettings, jobs: Sequence[SlurmJob]) -> list[str]:
    """Submit jobs in order and return their ids. With dry_run, print them instead.

    Raises PlanError if Slurm is missing, or with Slurm's own message if it rejects a job.
    """
    if not settings.dry_run and shutil.which("sbatch") is None:
        raise PlanError("sbatch is not on the PATH: submit on a login node, or use --dry-run")
    ids: list[str] = []
    before = settings.after
    for number, job in enumerate(jobs):
        script, path = job_script(settings, job), job.run_dir / "job.sbatch"
        command = ["sbatch", "--parsable"]
        if before:
            command.append(f"--dependency=afterok:{before}")
        command.append(str(path))
        if settings.dry_run:
            print(f"# {path}\n{script}\n# {shlex.join(command)}\n")
            before = f"JOB_{number + 1}"
            ids.append(before)
            continue
        job.run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            waiting = f"; jobs {', '.join(ids)} stay in the queue" if ids else ""
            raise PlanError(f"{shlex.join(command)}: {done.stderr.strip()}{waiting}")
        before = done.stdout.strip().partition(";")[0]
        print(f"{job.name}: job {before}, {path}")
        ids.append(before)
    return ids
