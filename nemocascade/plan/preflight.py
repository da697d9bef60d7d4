"""Checks of a job before it starts, which report all problems at once with their remedies.

These checks need no other rank: settings, files, disk, tokenizer, checkpoint, predicted memory, and
the dry run. The dry run builds every rank's model on the meta device in a fake world of the job's
real size. `devices` holds the checks of devices and collectives at the start of a job.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tyro

from nemocascade.data.tokenizer import check_vocabulary, load_tokenizer
from nemocascade.megatron.artifact import read_artifact
from nemocascade.megatron.checkpoint import CheckpointError, latest_checkpoint
from nemocascade.megatron.fake import build_on_meta, fake_world
from nemocascade.plan.devices import job_here
from nemocascade.plan.findings import Preflight
from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import Job, is_scan_problem, job_of_recipe
from nemocascade.plan.memory import GIB, available, every_rank
from nemocascade.plan.parameters import stage_parameters
from nemocascade.plan.search import nearest_fitting
from nemocascade.recipe import ParallelConfig, StageRecipe
from nemocascade.recipe.paths import named_paths
from nemocascade.recipe.rules import Natural
from nemocascade.runtime.world import world_size_of_environment
from nemocascade.train.checkpointing import refused_changes


@dataclass(frozen=True)
class PreflightSettings:
    """Check a recipe: settings, files, disk, tokenizer, start, memory, and a dry run of every rank.

    Devices and collectives are checked by the job itself when it starts.
    """

    recipe: tyro.conf.Positional[str]
    """Recipe script."""

    ranks: Natural = 0
    """World size; 0 = the launcher's, or 1 without one."""

    gpu: str = "h200"
    """A known accelerator, or a JSON file with the fields of nemocascade.plan.gpus.Gpu."""

    model: str = ""
    """Model preset, to check a recipe before its earlier stages have run; its start artifact is
    then not checked."""

    dry_run: bool = True
    """Build every rank's model on the meta device."""

    json: bool = False
    """Print one JSON object."""

    @property
    def world_size(self) -> int:
        """Number of ranks to check for."""
        return self.ranks or world_size_of_environment()


def check_recipe(recipe: StageRecipe, settings: PreflightSettings, into: Preflight) -> None:
    """Run all checks of a recipe that need neither devices nor other ranks."""
    ranks, job = settings.world_size, None
    with into.guarded("model"):
        job = job_of_recipe(recipe, find_gpu(settings.gpu), ranks, preset=settings.model)
    checked = offline(recipe, job, ranks, dry_run=settings.dry_run, ahead=bool(settings.model))
    into.findings += checked.findings
    into.seconds = checked.seconds


def offline(
    recipe: Any, job: Job | None, world_size: int, *, dry_run: bool, ahead: bool = False
) -> Preflight:
    """Checks that need neither devices nor other ranks. job: None if the recipe's model is unknown,
    which is a finding already. ahead: earlier stages have not run, so their artifacts are not
    checked."""
    started = time.perf_counter()
    found = Preflight()
    check_settings(recipe, world_size, found)
    check_files(recipe, found)
    if not ahead:
        check_start(recipe, found)
        check_artifacts(recipe, found)
    check_servers(recipe, found)
    check_tokenizer(recipe, found)
    if job is not None:
        check_disk(job, recipe, found)
        check_memory(job, found)
        if dry_run:
            check_dry_run(job, found)
    found.seconds = time.perf_counter() - started
    return found


def problems_before(recipe: Any, world_size: int) -> list[str]:
    """All problems of a job before its ranks form a process group."""
    found = Preflight()
    check_settings(recipe, world_size, found)
    check_files(recipe, found)
    job = None if found.problems else job_here(recipe, world_size)
    if job is not None:
        check_disk(job, recipe, found)
        check_memory(job, found)
    return found.problems


def check_settings(recipe: Any, world_size: int, into: Preflight) -> None:
    """Check the rules of the recipe's settings."""
    into.add("settings", recipe.problems(world_size), f"{world_size} ranks")


def check_files(recipe: Any, into: Preflight) -> None:
    """Check that every file that the recipe names exists, and that its folders can be written."""
    with into.guarded("data files"):
        paths = list(named_paths(recipe, "input"))
        missing = [
            f"{name}: {path} does not exist: mend --{_option(name)}"
            for name, path in paths
            if not Path(path).exists()
        ]
        into.add("data files", missing, f"{len(paths)} named")
    with into.guarded("run folder"):
        problems = [
            f"{parent} cannot be written: choose another --{_option(name)}"
            for name, path in named_paths(recipe, "output")
            if not os.access(parent := _existing(path), os.W_OK)
        ]
        into.add("run folder", problems, str(getattr(recipe, "run_dir", "")))


def check_artifacts(recipe: Any, into: Preflight) -> None:
    """Check that teachers and judges are readable artifacts. The start has its own check."""
    with into.guarded("artifacts"):
        paths = [(n, p) for n, p in named_paths(recipe, "artifact") if n != "init_from"]
        problems = []
        for name, path in paths:
            try:
                read_artifact(Path(path))
            except CheckpointError as error:
                problems.append(f"--{_option(name)}: {error}")
        into.add("artifacts", problems, f"{len(paths)} named")


def check_servers(recipe: Any, into: Preflight) -> None:
    """Warn if nobody listens where a judge is asked: a server may start with the job."""
    with into.guarded("servers"):
        urls = list(named_paths(recipe, "url"))
        warnings = [
            f"{name}: nobody answers at {url} from this host ({reason}): start the server before "
            f"the job, or mend --{_option(name)}"
            for name, url in urls
            if (reason := _unreachable(url))
        ]
        into.add("servers", [], f"{len(urls)} named", warnings)


def _unreachable(url: str) -> str:
    """Reason why no connection to the URL's host can be opened; empty if one can."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=3.0).close()
    except OSError as error:
        return str(error)
    return ""


def _option(name: str) -> str:
    return name.replace("_", "-")


def _existing(folder: str) -> Path:
    """The folder, or its nearest parent that exists."""
    path = Path(folder)
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def check_disk(job: Job, recipe: Any, into: Preflight) -> None:
    """Check the disk space for the kept checkpoints, one being written, and the artifact."""
    with into.guarded("disk"):
        parent = _existing(recipe.run_dir)
        [listed] = stage_parameters(job.model, ParallelConfig(), job.moe, 0)
        count = sum(p.numel for p in listed)
        # Weights in the run's precision, and the optimizer state of a checkpoint.
        width, main = (2, 4) if job.engine.precision == "bf16" else (4, 0)
        weights, states = float(count * width), float(count * (main + 8))
        keep = max(1, recipe.checkpoint.keep)
        needed = (keep + 1) * (weights + states) + weights
        free = shutil.disk_usage(parent).free
        problems = []
        if free < needed:
            problems.append(
                f"{parent} has {free / GIB:.1f} GiB free; {keep + 1} checkpoints and the artifact "
                f"take {needed / GIB:.1f} GiB: make room, or lower --checkpoint.keep"
            )
        into.add("disk", problems, f"{needed / GIB:.1f} of {free / GIB:.1f} GiB free")


def check_start(recipe: Any, into: Preflight) -> None:
    """Check that the checkpoint or artifact to start from is readable and complete."""
    with into.guarded("start"):
        problems = []
        found = "random weights"
        try:
            checkpoint = latest_checkpoint(Path(recipe.run_dir) / "checkpoints")
            if checkpoint is not None:
                found = f"checkpoint {checkpoint.name}"
                problems = refused_changes(recipe)
            elif recipe.init_from:
                found = f"artifact {read_artifact(Path(recipe.init_from)).digest[:12]}"
        except CheckpointError as error:
            problems = [str(error)]
        into.add("start", problems, found)


def check_tokenizer(recipe: Any, into: Preflight) -> None:
    """Check that the tokenizer is readable and that its ids fit the embedding."""
    settings = getattr(recipe, "tokenizer", None)
    if settings is None or (recipe.init_from and not settings.path):
        into.add("tokenizer", [], "comes with the artifact")
        return
    if not settings.path:
        too_many = settings.train_vocab_size > recipe.model.vocab_size
        into.add(
            "tokenizer",
            [
                f"tokenizer.train_vocab_size({settings.train_vocab_size}) is above "
                f"model.vocab_size({recipe.model.vocab_size}): lower it"
            ]
            * too_many,
            "trained at the first start",
        )
        return
    with into.guarded("tokenizer"):
        tokenizer = load_tokenizer(settings.path)
        check_vocabulary(tokenizer, recipe.model.vocab_size)
        into.add("tokenizer", [], f"{tokenizer.vocab_size} ids")


def check_memory(job: Job, into: Preflight) -> None:
    """Check that no rank needs more memory than its device has."""
    if found := job.problems():
        # The settings' own rules have been reported before; those of the scan come last.
        if is_scan_problem(found):
            into.add("memory", found, "")
        return
    with into.guarded("memory"):
        ranks = every_rank(job)
        worst = max(range(len(ranks)), key=lambda r: ranks[r].total)
        need, have = ranks[worst].total, available(job)
        problems = []
        if need > have:
            nearest = nearest_fitting(job)
            remedy = "no layout fits: use more ranks or a smaller capacity"
            if nearest is not None:
                remedy = f"the nearest layout that fits is {nearest.describe()}"
            problems.append(
                f"rank {worst} needs {need / GIB:.1f} GiB, a {job.gpu.name} gives "
                f"{have / GIB:.1f}: {remedy}; --engine.preflight False starts all the same"
            )
        into.add("memory", problems, f"{need / GIB:.1f} of {have / GIB:.1f} GiB on rank {worst}")


def check_dry_run(job: Job, into: Preflight) -> None:
    """Build every rank's model on the meta device in a fake world of the job's size, and compare
    its parameters with the planner's count."""
    if job.problems():
        return
    started = time.perf_counter()
    p = job.parallel
    with into.guarded("dry run"):
        problems = []
        total = 0
        planned = [
            sum(q.numel for chunk in stage_parameters(job.model, p, job.moe, stage) for q in chunk)
            for stage in range(p.pp)
        ]
        for rank in range(job.world_size):
            with fake_world(rank, job.world_size, p) as world:
                chunks = build_on_meta(world, job.model, job.engine, job.moe)
                built = sum(t.numel() for c in chunks for t in c.parameters())
                listed = planned[world.pp_rank]
            total += built
            if built != listed:
                problems.append(f"rank {rank} builds {built} parameters, the planner says {listed}")
        seconds = time.perf_counter() - started
        into.add(
            "dry run",
            problems,
            f"{job.world_size} ranks built on the meta device in {seconds:.1f} s, "
            f"{total / job.world_size / 1e9:.3f} B parameters a rank",
        )
