"""Slurm jobs of recipes: one sbatch script a stage, each dependent on the one before.

    nemocascade submit sft.py grpo.py --nodes 32 --partition gpu --time 24:00:00

The script comes from a template, which a site may replace. Before the time limit Slurm signals the
batch shell, which creates the file RUN/stop. The ranks stop within seconds where rollouts are made,
otherwise at the end of the step, and save a checkpoint. The job requeues itself, and a run resumes
from its newest checkpoint without further settings.

After any other end, the job starts the stage again on the same allocation: after a pause that
doubles, without the nodes that the watchdog has named, and not after an error that would occur
again, such as a recipe's. It gives up after `restarts` starts in a row without a further step.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from nemocascade.plan.errors import PlanError
from nemocascade.plan.slurm_nodes import further_nodes, slurm_options
from nemocascade.plan.submission import SlurmJob, SubmitSettings
from nemocascade.recipe.envs import RayConfig
from nemocascade.recipe.rules import number_problems
from nemocascade.runtime.files import write_text
from nemocascade.runtime.jsonl import read_undamaged
from nemocascade.runtime.logging import LOGGER
from nemocascade.train.lead_time import needed_s

TEMPLATE = Path(__file__).with_name("template.sbatch")
COPIED = (
    *("nodes", "ranks_per_node", "time", "warning_s", "torchrun", "port", "restarts", "pause_s"),
)
"""Settings that the template uses by their own names."""
STOPPED = 75
"""Exit code of ranks that saved a checkpoint and stopped on request: EX_TEMPFAIL, try again."""
FINAL = (2, 3, 5, 130)
"""Exit codes after which a start would end alike: errors of users, NaN, a cascade's alarm, Ctrl-C;
see `exit_cleanly`."""
STEPS = 200
"""Newest steps of a run whose times are compared with `warning_s`."""
_TIME = re.compile(r"((?P<days>\d+)-)?(?P<rest>\d+(:\d+){0,2})")


def check_submission(settings: SubmitSettings, arguments: Sequence[str]) -> None:
    """Raises PlanError listing all invalid settings."""
    problems = []
    if not settings.recipes:
        problems.append("no recipe: name at least one script")
    problems += number_problems(settings)
    problems += [f"{r} is not a file" for r in settings.recipes if not Path(r).is_file()]
    problems += [
        f"{name}({path}) is not a file: fix --{name}"
        for name in ("template", "environment")
        if (path := getattr(settings, name)) and not Path(path).is_file()
    ]
    problems += _time_problems(settings)
    if len(settings.recipes) > 1 and any(a.startswith("--run-dir") for a in arguments):
        problems.append("--run-dir with several recipes: they would share one folder")
    for kind, count, model in (
        ("server", settings.servers, settings.server_model),
        ("judge", settings.judge_nodes, settings.judge_model),
    ):
        if count and not model:
            problems.append(f"{kind}_model is empty: name the model that the {kind} nodes serve")
    if settings.worker_nodes and settings.worker_address:
        problems.append("worker_nodes and worker_address name two Ray clusters: set one of them")
    problems += RayConfig(settings.worker_address).problems("worker_address: ray")
    if problems:
        raise PlanError("; ".join(problems))


def _time_problems(settings: SubmitSettings) -> list[str]:
    """A problem of the time limit: of its form, or that the warning comes at the start already."""
    if settings.time.upper() in ("UNLIMITED", "INFINITE"):
        return []
    if not (found := _TIME.fullmatch(settings.time)):
        return [
            f"time({settings.time!r}) is not a time limit of Slurm: write minutes, "
            "hours:minutes:seconds, or days-hours"
        ]
    days, parts = int(found["days"] or 0), [int(part) for part in found["rest"].split(":")]
    # Without days, one number is minutes, and two are minutes and seconds.
    first = 0 if found["days"] or len(parts) == 3 else 1
    limit_s = days * 86_400 + sum(p * 60 ** (2 - first - i) for i, p in enumerate(parts))
    # 0 is not a limit.
    if settings.warning_s < limit_s or not limit_s:
        return []
    return [
        f"warning_s({settings.warning_s}) is not below time({settings.time}), {limit_s} s: each "
        "start would be asked to stop at once; lower --warning-s or raise --time"
    ]


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
    """The sbatch script of a job. Raises PlanError for a template that cannot be filled."""
    container = ""
    if settings.container_image:
        container = f"--container-image={shlex.quote(settings.container_image)} "
        if settings.container_mounts:
            container += f"--container-mounts={shlex.quote(settings.container_mounts)} "
    template = Path(settings.template or TEMPLATE).read_text(encoding="utf-8")
    nodes = further_nodes(settings, job, container)
    is_group = any(n.count for n in nodes)
    values = dict(
        job_name=shlex.quote(f"nemocascade-{job.run_dir.name}"),
        **{name: getattr(settings, name) for name in COPIED},
        log=shlex.quote(str(job.run_dir / "slurm-%j.txt")),
        options="".join(f"#SBATCH {o}\n" for o in slurm_options(settings))
        + "".join(n.options(settings) for n in nodes),
        recipe=shlex.quote(str(job.recipe)),
        run_dir=shlex.quote(str(job.run_dir)),
        again=STOPPED,
        final="|".join(map(str, FINAL)),
        all_nodes=settings.nodes + settings.spare_nodes,
        environment=f". {shlex.quote(settings.environment)}" if settings.environment else "",
        srun_options=f"{settings.srun_options} " if settings.srun_options else "",
        container=container,
        group="--het-group=0 " if is_group else "",
        servers="".join(n.start(settings, i) for i, n in enumerate(nodes, start=1)),
        servers_end="".join(["kill $servers 2>/dev/null\n"] * bool(nodes) + [n.end for n in nodes]),
        arguments=" ".join([shlex.join(job.arguments), *(n.arguments(job) for n in nodes)]).strip(),
    )
    try:
        return template.format(**values)
    except (LookupError, ValueError, AttributeError) as error:
        raise PlanError(
            f"template({settings.template}) cannot be filled ({error!r}): write braces of the "
            f"shell twice, as in ${{{{HOME}}}}; placeholders are {', '.join(sorted(values))}"
        ) from error


def warn_of_steps(settings: SubmitSettings, jobs: Sequence[SlurmJob]) -> list[str]:
    """Warnings for runs whose measured steps are longer than `warning_s` leaves time for."""
    found = []
    for job in jobs:
        path = job.run_dir / "metrics.jsonl"
        if not path.is_file():
            continue
        rows = [row for _, row in read_undamaged(path, lambda line: None)][-STEPS:]
        longest = max(map(needed_s, rows), default=0.0)
        if longest > settings.warning_s:
            found.append(
                f"{job.name}: two steps and a checkpoint took {longest:.0f} s, and a checkpoint is "
                f"asked for warning_s({settings.warning_s}) before the time limit: set --warning-s "
                f"{math.ceil(longest)} or more"
            )
    return found


def submit_jobs(settings: SubmitSettings, jobs: Sequence[SlurmJob]) -> list[str]:
    """Submit jobs in order and return their ids. With dry_run, print them instead.

    Raises PlanError if Slurm is missing, or with Slurm's own message if it rejects a job.
    """
    if not settings.dry_run and shutil.which("sbatch") is None:
        raise PlanError("sbatch is not on the PATH: submit on a login node, or use --dry-run")
    for warning in warn_of_steps(settings, jobs):
        LOGGER.warning(warning)
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
