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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from nemocascade.plan.errors import PlanError
from nemocascade.recipe.rules import Count, Natural, Range, number_problems
from nemocascade.runtime.files import write_text

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


def check_submission(settings: SubmitSettings, arguments: Sequence[str]) -> None:
    """Raises PlanError listing all invalid settings."""
    problems = []
    if not settings.recipes:
        problems.append("no recipe: name at least one script")
    problems += number_problems(settings)
    problems += [f"{r} is no file" for r in settings.recipes if not Path(r).is_file()]
    if len(settings.recipes) > 1 and any(a.startswith("--run-dir") for a in arguments):
        problems.append("--run-dir with several recipes: they would share one folder")
    for kind, count, model in (
        ("server", settings.servers, settings.server_model),
        ("judge", settings.judge_nodes, settings.judge_model),
    ):
        if count and not model:
            problems.append(f"{kind}_model is empty: name the model that the {kind} nodes serve")
    if problems:
        raise PlanError("; ".join(problems))


def job_of_script(
    script: Path, run_dir: str, arguments: Sequence[str], *, rollouts: bool = False
) -> SlurmJob:
    """The job of a recipe script. run_dir: the recipe's own, unless the arguments override it.
    rollouts: its stage generates rollouts."""
    for index, argument in enumerate(arguments):
        if argument == "--run-dir" and index + 1 < len(arguments):
            run_dir = arguments[index + 1]
        elif argument.startswith("--run-dir="):
            run_dir = argument.partition("=")[2]
    return SlurmJob(script, Path.cwd() / run_dir, tuple(arguments), "" if rollouts else None)


def job_script(settings: SubmitSettings, job: SlurmJob) -> str:
    """The sbatch script of a job."""
    container = ""
    if settings.container_image:
        container = f"--container-image={shlex.quote(settings.container_image)} "
        if settings.container_mounts:
            container += f"--container-mounts={shlex.quote(settings.container_mounts)} "
    template = Path(settings.template or TEMPLATE).read_text(encoding="utf-8")
    nodes = _server_nodes(settings, job)
    return template.format(
        job_name=f"nemocascade-{job.run_dir.name}",
        **{name: getattr(settings, name) for name in COPIED},
        log=job.run_dir / "slurm-%j.txt",
        options="".join(f"#SBATCH {o}\n" for o in _options(settings))
        + "".join(n.options(settings) for n in nodes),
        recipe=shlex.quote(str(job.recipe)),
        run_dir=shlex.quote(str(job.run_dir)),
        again=STOPPED,
        environment=f". {shlex.quote(settings.environment)}" if settings.environment else "",
        srun_options=f"{settings.srun_options} " if settings.srun_options else "",
        container=container,
        group="--het-group=0 " if nodes else "",
        servers="".join(n.start(settings, i) for i, n in enumerate(nodes, start=1)),
        arguments=" ".join([shlex.join(job.arguments), *(n.arguments(job) for n in nodes)]).strip(),
    )


@dataclass(frozen=True)
class _ServerNodes:
    """Nodes of a heterogeneous job, each with one server. folder: of their announcements, in the
    run folder. used_by: settings of the recipe that use the servers; {} is the folder."""

    count: int
    folder: str
    model: str
    name: str
    more: str
    used_by: tuple[str, ...]

    def options(self, settings: SubmitSettings) -> str:
        """Lines that ask Slurm for the nodes."""
        own = replace(settings, ranks_per_node=settings.server_gpus)
        named = [f"--nodes={self.count}", "--ntasks-per-node=1", *_options(own)]
        return "#SBATCH hetjob\n" + "".join(f"#SBATCH {o}\n" for o in named)

    def start(self, settings: SubmitSettings, group: int) -> str:
        """Lines that start the servers."""
        parallel = f" --tensor-parallel-size {settings.server_gpus}" if settings.gpus else ""
        more = f" {self.more}" if self.more else ""
        return (
            f'rm -f "$run_dir"/{self.folder}/*.json\n'
            f"srun --het-group={group} {settings.serve} {shlex.quote(self.model)} "
            f'--announce "$run_dir/{self.folder}" --name {self.name}{parallel}{more} \\\n'
            f'  > "$run_dir/{self.folder}.txt" 2>&1 &\nservers="$servers $!"\n'
        )

    def arguments(self, job: SlurmJob) -> str:
        """Arguments of the recipe that point it at the servers."""
        return " ".join(
            f"--{job.settings}{setting}".format(f'"$run_dir/{self.folder}"', self.count)
            for setting in self.used_by
        )


def _server_nodes(settings: SubmitSettings, job: SlurmJob) -> list[_ServerNodes]:
    found = []
    used: tuple[str, ...]
    if settings.servers and job.settings is not None:
        used = ("engine server", "server.announce {0}", "server.servers {1}")
        found.append(
            _ServerNodes(
                settings.servers,
                "servers",
                settings.server_model,
                "policy",
                settings.server_options,
                tuple(f"rollout.{setting}" for setting in used),
            )
        )
    if settings.judge_nodes and job.settings is not None:
        used = ("kind server", "announce {0}", "servers {1}", "model judge")
        found.append(
            _ServerNodes(
                settings.judge_nodes,
                "judges",
                settings.judge_model,
                "judge",
                f"--with-tokenizer {settings.judge_options}".strip(),
                tuple(f"envs.judge.{setting}" for setting in used),
            )
        )
    return found


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
        write_text(path, script)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            waiting = f"; jobs {', '.join(ids)} stay in the queue" if ids else ""
            raise PlanError(f"{shlex.join(command)}: {done.stderr.strip()}{waiting}")
        before = done.stdout.strip().partition(";")[0]
        print(f"{job.name}: job {before}, {path}")
        ids.append(before)
    return ids
