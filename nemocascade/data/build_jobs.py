"""Runs the shards of a build as tasks of datatrove's executors: processes, or Slurm arrays.

datatrove is an optional package, imported where it is used. A shard is finished when its part is
written, whatever datatrove's own records say, so a killed job loses only unfinished shards.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from nemocascade.data import synthetic
from nemocascade.data.building import (
    PLAN,
    BuildPlan,
    build_key,
    is_finished,
    join_shards,
    plan_build,
    read_plan,
    remove_partial_files,
    token_bytes,
    tokenize_shard,
    work_folder,
)
from nemocascade.data.built import differing_settings, verify_built
from nemocascade.data.cache_files import read_manifest, write_json
from nemocascade.data.tokenizer import Tokenizer, load_tokenizer
from nemocascade.recipe import RecipeError
from nemocascade.recipe.build import BuildSettings
from nemocascade.runtime.logging import LOGGER, start_logging
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.row_files import is_built
from nemocascade.runtime.run_lock import RunLock

POLL_S, REPORT_S, GRACE_S = 1.0, 10.0, 15.0
"""Seconds between looks at the parts, between lines of progress, and between the death of a worker
and the end of the build: workers also end when a build ends."""
LARGEST_ARRAY = 1000
"""Tasks of a Slurm array; Slurm's default limit is 1,001."""


@dataclass(frozen=True)
class TokenizeStep:
    """Step of a pipeline: its task number is that of a shard. work: the work folder."""

    work: str

    def __call__(self, _data: Any, rank: int, _world_size: int) -> None:
        _silence()
        tokenize_shard(Path(self.work), rank)


@dataclass(frozen=True)
class JoinStep:
    """Step of the single task that joins the shards. work, output: the folders."""

    work: str
    output: str

    def __call__(self, _data: Any, _rank: int, _world_size: int) -> None:
        _silence()
        start_logging(None, is_main=True)
        LOGGER.info("%s", summary(self.output, join_shards(Path(self.work), Path(self.output))))


def run_build(settings: BuildSettings, tokenizer: str) -> str:
    """Build or verify a folder; returns a line about it.

    tokenizer: its path. Raises RecipeError for invalid settings, and DataError as `build` and
    `verify_built`.
    """
    if problems := settings.problems():
        raise RecipeError(problems)
    start_logging(None, is_main=True)
    output = Path(settings.output).absolute()
    if settings.verify:
        return f"{summary(output, verify_built(output))}; every file has its hash"
    manifest = build(settings, load_tokenizer(tokenizer))
    return f"{output} is not built yet" if manifest is None else summary(output, manifest)


def build(settings: BuildSettings, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Build the folder, or resume an interrupted build; with Slurm, submit its jobs.

    Returns the folder's manifest; None while Slurm's jobs run.
    Raises DataError for data, settings, an existing folder or a machine that stops the build, and
    FolderInUseError while another process builds it.
    """
    output = Path(settings.output).absolute()
    work = work_folder(output)
    if is_built(output):
        manifest = read_manifest(output)
        if build_key(settings.data, tokenizer, settings.seed) != manifest["key"]:
            found = differing_settings(
                manifest["key"], settings.data, tokenizer, seed=settings.seed
            )
            said = "; ".join(found) or "the files of data.path have changed"
            raise DataError(f"{output} is built from other data: {said}. Choose another --output")
        LOGGER.info("%s is built already", output)
        shutil.rmtree(work, ignore_errors=True)
        return manifest
    if output.exists():
        raise DataError(f"{output} exists and is not a built folder: choose another --output")
    _check_place(output, settings.data.path)
    lock = RunLock(work, option="--output")
    try:
        lock.acquire()
    except OSError as error:
        raise DataError(f"{work} cannot be written ({error}): choose another --output") from error
    try:
        made = _build_owned(settings, tokenizer, work, output)
    finally:
        lock.release()
        with suppress(OSError):
            work.rmdir()  # nothing was planned
    if made is not None:
        shutil.rmtree(work, ignore_errors=True)
    return made


def _check_place(output: Path, paths: Sequence[str]) -> None:
    """Raise DataError for a folder of rows that OUTPUT is in: its files would be read as rows."""
    for name in paths:
        if not name.startswith(synthetic.PREFIX):
            folder = Path(name).expanduser().resolve()
            if folder.is_dir() and output.resolve().is_relative_to(folder):
                raise DataError(
                    f"{output} is inside {name}, whose files are rows of data.path: choose an "
                    "--output beside it"
                )


def _build_owned(
    settings: BuildSettings, tokenizer: Tokenizer, work: Path, output: Path
) -> dict[str, Any] | None:
    """Build in a work folder that this process owns; see `build`."""
    if output.exists():
        raise DataError(f"{output} was made meanwhile by another process: run the command again")
    if waiting := _in_queue(work):
        if (work / PLAN).is_file():
            LOGGER.info("%s", progress(read_plan(work), work, 0, 0.0))
        LOGGER.info("jobs in the queue: %s", ", ".join(waiting))
        return None
    plan = plan_build(
        output, settings.data, tokenizer, seed=settings.seed, size=settings.shard_mib << 20
    )
    remove_partial_files(work)
    left = [n for n in range(len(plan.shards)) if not is_finished(work, n)]
    LOGGER.info(
        "%s: %d shards of %.2f GiB, %d of them to tokenise",
        output,
        len(plan.shards),
        sum(plan.sizes) / 2**30,
        len(left),
    )
    for name in ("join/completions/00000", *(f"tokenize/completions/{n:05d}" for n in left)):
        (work / "jobs" / name).unlink(missing_ok=True)
    try:
        if settings.slurm.partition:
            _submit(settings, plan, work, output)
            return None
        _run_here(settings.workers or len(os.sched_getaffinity(0)), plan, work)
    except ImportError as error:
        raise DataError(
            f"building needs datatrove ({error}): pip install 'nemocascade[data]'; a stage reads "
            "small data without a build"
        ) from error
    return join_shards(work, output)


def summary(folder: str | Path, manifest: dict[str, Any]) -> str:
    """Counts of a built folder, in a line."""
    bad = manifest["bad_rows"]
    return (
        f"{folder}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
        f"{manifest['trained_tokens']:,} trained, {len(manifest['shards'])} shards, "
        f"{bad:,} bad rows" + (f", first: {manifest['bad_examples'][0]}" if bad else "")
    )


def _run_here(workers: int, plan: BuildPlan, work: Path) -> None:
    """Tokenise the shards in processes of this machine."""
    from datatrove.executor import LocalPipelineExecutor

    _silence()
    with watching(plan, work):
        LocalPipelineExecutor(
            pipeline=[TokenizeStep(str(work))],
            tasks=len(plan.shards),
            workers=min(workers, len(plan.shards)),
            logging_dir=str(work / "jobs" / "tokenize"),
        ).run()


def _submit(settings: BuildSettings, plan: BuildPlan, work: Path, output: Path) -> None:
    """Submit the Slurm jobs."""
    from datatrove.executor import SlurmPipelineExecutor

    _silence()
    slurm = settings.slurm
    LOGGER.info("%s", progress(plan, work, 0, 0.0))
    lines = [f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"]
    if slurm.environment:
        lines.append(f". {shlex.quote(str(Path(slurm.environment).absolute()))}")

    # A join whose tasks have failed would stay in the queue, and the build could not be resumed.
    more = {"kill-on-invalid-dep": "yes"}
    if slurm.account:
        more["account"] = slurm.account

    def executor(name: str, step: TokenizeStep | JoinStep, tasks: int, before: Any) -> Any:
        return SlurmPipelineExecutor(
            pipeline=[step],
            tasks=tasks,
            tasks_per_job=-(-tasks // LARGEST_ARRAY),
            workers=slurm.tasks or -1,
            time=slurm.time,
            partition=slurm.partition,
            mem_per_cpu_gb=slurm.memory_gib,
            qos=slurm.qos,
            sbatch_args=more,
            job_name=f"{output.name}-{name}",
            env_command="\n".join(lines),
            logging_dir=str(work / "jobs" / name),
            depends=before,
        )

    first = executor("tokenize", TokenizeStep(str(work)), len(plan.shards), None)
    last = executor("join", JoinStep(str(work), str(output)), 1, first)
    try:
        last.run()
    except (OSError, subprocess.CalledProcessError) as error:
        raise DataError(f"sbatch did not take the jobs: {error}") from error
    jobs = [str(e.job_id) for e in (first, last) if e.job_id not in (None, -1)]
    write_json(_record(work), jobs)
    LOGGER.info("submitted jobs %s; the same command shows their progress", ", ".join(jobs))


def _record(work: Path) -> Path:
    """File with the ids of a build's Slurm jobs."""
    return work / "jobs" / "slurm.json"


def _in_queue(work: Path) -> list[str]:
    """Id and state of each Slurm job of a build that has not ended.

    Raises DataError if Slurm does not say it: the same shards would be submitted twice.
    """
    if not _record(work).is_file():
        return []
    jobs = ",".join(json.loads(_record(work).read_bytes()))
    command = ["squeue", "--noheader", "--format", "%i %T", "--jobs", jobs]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        said = found.stderr.strip() if found.returncode else ""
    except OSError as error:
        said = str(error)
    # Slurm forgets a job some minutes after its end.
    if said and "Invalid job id" not in said:
        raise DataError(
            f"squeue does not say if jobs {jobs} of {work} still run ({said}): ask where Slurm "
            f"answers, or delete {_record(work)} if they have ended"
        )
    return [] if said else found.stdout.split("\n")[:-1]


def progress(plan: BuildPlan, work: Path, before: int, seconds: float) -> str:
    """A line about the work so far. before: bytes of tokens at the start; seconds: since it."""
    done = [n for n in range(len(plan.shards)) if is_finished(work, n)]
    tokens = token_bytes(work)
    rows, total = sum(plan.sizes[n] for n in done), sum(plan.sizes)
    line = (
        f"{len(done)} of {len(plan.shards)} shards, {rows / 2**30:.2f} of {total / 2**30:.2f} GiB "
        f"of rows, {tokens // 4:,} tokens"
    )
    if seconds and tokens > before:
        line += f", {(tokens - before) / 4 / seconds:,.0f} tokens/s"
    return line


@contextmanager
def watching(plan: BuildPlan, work: Path) -> Iterator[None]:
    """Log the progress of the shards, and end the build if a worker process is killed, for which
    a pool of processes would wait for ever."""
    over, killed = threading.Event(), threading.Event()
    main = threading.main_thread().ident
    start, started = token_bytes(work), time.monotonic()

    def watch() -> None:
        reported, workers = started, set[int]()
        while not over.wait(POLL_S):
            with suppress(psutil.Error):
                # Workers, not the programs that they start: forks have their server's command line.
                children = psutil.Process().children(recursive=True)
                alive = {p.pid for p in children if "forkserver" in "".join(p.cmdline())}
                if workers - alive and not over.wait(GRACE_S):
                    killed.set()
                    signal.pthread_kill(main or 0, signal.SIGINT)
                    return
                workers |= alive
            if time.monotonic() - reported >= REPORT_S:
                reported = time.monotonic()
                LOGGER.info("%s", progress(plan, work, start, reported - started))

    thread = threading.Thread(target=watch, name="build progress", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if killed.is_set():
            raise DataError(
                "a worker process was killed, perhaps for its memory: the same command resumes "
                "the build; --workers sets the number of processes"
            ) from None
        raise
    finally:
        over.set()
        thread.join()
    LOGGER.info("%s", progress(plan, work, start, time.monotonic() - started))


def _silence() -> None:
    """Switch off datatrove's own log: progress and errors are reported here."""
    from loguru import logger

    logger.disable("datatrove")
