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
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nemocascade.data.built import NO_TOKENIZER, open_built
from nemocascade.data.documents import built_folder
from nemocascade.data.tokenizer import check_vocabulary, load_tokenizer
from nemocascade.megatron.artifact import read_artifact
from nemocascade.megatron.checkpoint import CheckpointError, latest_checkpoint
from nemocascade.megatron.fake import build_on_meta, fake_world
from nemocascade.megatron.world import FILES, raise_file_limit
from nemocascade.plan.devices import job_here
from nemocascade.plan.findings import Preflight
from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import Job, is_scan_problem, job_of_recipe
from nemocascade.plan.memory import GIB, available, every_rank, shortage, urgency, with_slots
from nemocascade.plan.parameters import MOMENT_BYTES, stage_parameters
from nemocascade.plan.search import nearest_fitting
from nemocascade.plan.settings import PreflightSettings
from nemocascade.plan.sockets import OTHER_FILES, host_sockets
from nemocascade.recipe import DataConfig, ParallelConfig, StageRecipe
from nemocascade.recipe.envs import sandboxes
from nemocascade.recipe.paths import named_paths
from nemocascade.runtime.ray_cluster import cluster_problems
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.row_files import find_files, is_built, read_chunks
from nemocascade.train.checkpointing import rejected_changes

# Share of a step that ranks may wait for other pipeline stages without a warning.
MOST_BUBBLE = 0.2


def check_recipe(recipe: StageRecipe, settings: PreflightSettings, into: Preflight) -> None:
    """Run all checks of a recipe that need neither devices nor other ranks."""
    ranks, job = settings.world_size, None
    with into.guarded("model"):
        job = with_slots(
            job_of_recipe(recipe, find_gpu(settings.gpu), ranks, preset=settings.model)
        )
    offline(recipe, job, ranks, into, dry_run=settings.dry_run, ahead=bool(settings.model))


def offline(
    recipe: Any,
    job: Job | None,
    world_size: int,
    found: Preflight,
    *,
    dry_run: bool,
    ahead: bool = False,
) -> None:
    """Run the checks that need neither devices nor other ranks. job: None if the recipe's model is
    unknown, which is a finding already. ahead: earlier stages have not run, so their artifacts are
    not checked."""
    started = time.perf_counter()
    check_settings(recipe, world_size, found)
    check_files(recipe, found)
    check_rows(recipe, found)
    check_limits(recipe, world_size, found)
    if not ahead:
        check_start(recipe, found)
        check_artifacts(recipe, found)
    check_servers(recipe, found)
    check_workers(recipe, found)
    check_tokenizer(recipe, found)
    check_data(recipe, found, ahead=ahead)
    if job is not None:
        check_disk(job, recipe, found)
        check_memory(job, found)
        check_layout(job, found)
        if dry_run:
            check_dry_run(job, found)
    found.seconds += time.perf_counter() - started


def problems_before(recipe: Any, world_size: int) -> list[str]:
    """All problems of a job before its ranks form a process group."""
    found = Preflight()
    check_settings(recipe, world_size, found)
    check_files(recipe, found)
    check_limits(recipe, world_size, found)
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
        # A built folder replaces its rows, which may be elsewhere.
        data = getattr(recipe, "data", None)
        built = isinstance(data, DataConfig) and any(map(is_built, data.path))
        paths = [
            (name, path)
            for name, path in named_paths(recipe, "input")
            if not (built and name == "data.non_thinking_path")
        ]
        missing = [
            f"{name}: {path} does not exist: fix --{_option(name)}"
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


def check_rows(recipe: Any, into: Preflight) -> None:
    """Check that every file of rows can be read: its kind, its size, and the rows at its start."""
    with into.guarded("rows"):
        problems, count = [], 0
        for name, path in named_paths(recipe, "rows"):
            if (name == "data.path" and is_built(path)) or not Path(path).exists():
                # `check_data` reads a built folder; a missing path is a finding of the data files.
                continue
            try:
                for file in find_files(path):
                    count += 1
                    # A chunk is a few hundred rows.
                    next(iter(read_chunks(file)))
            except DataError as error:
                problems.append(f"{name}: {error}: fix --{_option(name)}")
        into.add("rows", list(dict.fromkeys(problems)), f"{count} files")


def check_limits(recipe: Any, world_size: int, into: Preflight) -> None:
    """Check that a rank may open as many files as it needs, after its own limit is raised. Skipped
    if the settings are wrong."""
    if into.problems:
        return
    with into.guarded("open files"):
        parallel = recipe.parallel
        rollout = getattr(recipe, "rollout", None)
        layout = parallel if rollout is None else rollout.parallel.layout(parallel)
        sockets = host_sockets(world_size, parallel, layout)
        limit = raise_file_limit()
        text = (
            f"the hard limit of open files is {limit}: raise it with `ulimit -n {FILES}` before "
            "the launcher, in limits.conf (nofile), or in LimitNOFILE of slurmd"
        )
        problems = [text] * (limit < sockets + OTHER_FILES)
        warnings = [text] * (not problems and limit < FILES)
        into.add("open files", problems, f"{limit}, of which {sockets} sockets", warnings)


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
            f"the job, or fix --{_option(name)}"
            for name, url in urls
            if (reason := _unreachable(url))
        ]
        into.add("servers", [], f"{len(urls)} named", warnings)


def check_workers(recipe: Any, into: Preflight) -> None:
    """Check that Ray clusters which run programs answer, and that the versions are this host's."""
    with into.guarded("workers"):
        named = {found.ray for found in sandboxes(recipe) if found.workers == "ray"}
        checked = [cluster_problems(settings) for settings in sorted(named, key=repr)]
        problems = [problem for found, _ in checked for problem in found]
        into.add("workers", problems, "; ".join(text for _, text in checked) or "local")


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
        [listed] = stage_parameters(job.model, ParallelConfig(), job.moe, 0, job.lora)
        count = sum(p.numel for p in listed)
        trained = sum(p.numel for p in listed if p.trained)
        # Weights in the run's precision, and the optimizer state of a checkpoint.
        width, main = (2, 4) if job.engine.precision == "bf16" else (4, 0)
        states = float(trained * (main + MOMENT_BYTES[recipe.optimizer.moments]))
        weights = float(count * width)
        keep = max(1, recipe.checkpoint.keep)
        needed = (keep + 1) * (weights + states) + weights
        free = shutil.disk_usage(parent).free
        problems = []
        if free < needed:
            problems.append(
                f"{parent} has {free / GIB:.1f} GiB free; {keep + 1} checkpoints and the artifact "
                f"take {needed / GIB:.1f} GiB: free some space, or lower --checkpoint.keep"
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
                problems = rejected_changes(recipe)
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


def check_data(recipe: Any, into: Preflight, *, ahead: bool = False) -> None:
    """Check that a built folder of data is complete, unchanged, and of the recipe's settings.

    ahead: earlier stages have not run, so the start artifact has no tokenizer yet.
    """
    data = getattr(recipe, "data", None)
    if not isinstance(data, DataConfig) or not any(map(is_built, data.path)):
        return
    if ahead and not recipe.tokenizer.path:
        into.add("data index", [], "checked at the start, with the artifact's tokenizer")
        return
    with into.guarded("data index"):
        path = recipe.tokenizer.path or (
            recipe.init_from and read_artifact(Path(recipe.init_from)).tokenizer_path
        )
        folder = built_folder(data.path)
        if not path or folder is None:
            raise DataError(NO_TOKENIZER)
        found = open_built(folder, data, load_tokenizer(path), seed=recipe.seed, check=True)
        into.add("data index", [], f"{len(found):,} documents in {folder}")


def check_memory(job: Job, into: Preflight) -> None:
    """Check that no rank needs more memory than its device has."""
    if found := job.problems():
        # The settings' own rules have been reported before; those of the scan come last.
        if is_scan_problem(found):
            into.add("memory", found, "")
        return
    with into.guarded("memory"):
        ranks = every_rank(job)
        worst = max(range(len(ranks)), key=lambda r: urgency(job, ranks[r]))
        need, have = ranks[worst].total, available(job)
        problems = []
        if short := shortage(job, ranks[worst]):
            nearest = nearest_fitting(job)
            remedy = "no layout fits: use more ranks or a smaller capacity"
            if nearest is not None:
                remedy = f"the nearest layout that fits is {nearest.describe()}"
            problems.append(
                f"rank {worst} {short}: {remedy}; --engine.preflight False starts all the same"
            )
        into.add("memory", problems, f"{need / GIB:.1f} of {have / GIB:.1f} GiB on rank {worst}")


def check_layout(job: Job, into: Preflight) -> None:
    """Warn of a pipeline bubble above `MOST_BUBBLE`, and of replicas without a rollout."""
    if job.problems():
        return
    with into.guarded("layout"):
        p, warnings = job.parallel, []
        waiting = (p.pp - 1) / p.vpp
        bubble = waiting / (job.microbatches + waiting)
        if bubble > MOST_BUBBLE:
            warnings.append(
                f"{bubble:.0%} of a step is pipeline bubble: pp({p.pp}) with {job.microbatches} "
                f"micro-batches a step and vpp({p.vpp}): lower --parallel.pp or raise "
                "--parallel.vpp"
            )
        found = f"bubble {bubble:.0%}"
        if job.work is not None and job.rollout.sequences:
            own = job.rollout.parallel.layout(p)
            replicas = own.data_parallel(job.world_size)
            idle = max(0, replicas - job.work.rollouts)
            found += f", {replicas} generation replicas"
            if idle:
                warnings.append(
                    f"{idle} of {replicas} generation replicas have no rollout, a step has "
                    f"{job.work.rollouts}: raise --rollout.parallel.tp({own.tp}), or use fewer "
                    "ranks"
                )
        into.add("layout", [], found, warnings)


def check_dry_run(job: Job, into: Preflight) -> None:
    """Build the models of all ranks on the meta device in a fake world of the job's size, and
    compare their parameters with the planner's count. Ranks that differ in their data-parallel
    coordinate alone build the same, which is built once."""
    if job.problems():
        return
    started = time.perf_counter()
    p = job.parallel
    with into.guarded("dry run"):
        problems = []
        total = 0
        made: dict[tuple[int, ...], int] = {}
        planned = [
            sum(q.numel for chunk in stage_parameters(job.model, p, job.moe, stage) for q in chunk)
            for stage in range(p.pp)
        ]
        stage_ranks = job.world_size // p.pp
        for rank in range(job.world_size):
            stage, inner = divmod(rank, stage_ranks)
            # The tensor, expert-tensor and expert coordinates.
            kind = (stage, inner % p.tp, inner % (p.etp * p.ep))
            if kind not in made:
                with fake_world(rank, job.world_size, p) as world:
                    chunks = build_on_meta(world, job.model, job.engine, job.moe)
                    made[kind] = sum(t.numel() for c in chunks for t in c.parameters())
            built, listed = made[kind], planned[stage]
            total += built
            if built != listed:
                problems.append(f"rank {rank} builds {built} parameters, the planner says {listed}")
        seconds = time.perf_counter() - started
        into.add(
            "dry run",
            problems,
            f"{job.world_size} ranks of {len(made)} kinds built on the meta device in "
            f"{seconds:.1f} s, "
            f"{total / job.world_size / 1e9:.3f} B parameters a rank",
        )
