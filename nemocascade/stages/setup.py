"""Startup steps of every stage: checks, the world of ranks, tokenizer, data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nemocascade.data.built import NO_TOKENIZER
from nemocascade.data.documents import DocumentSet, StageData, build_data, open_data
from nemocascade.data.loader import HeldoutLoader
from nemocascade.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from nemocascade.data.tokenizer_training import train_tokenizer
from nemocascade.megatron.accelerators import Detection, detect
from nemocascade.megatron.artifact import artifact_model, load_artifact_weights
from nemocascade.megatron.config import Accelerators, make_config
from nemocascade.megatron.model import build_model
from nemocascade.megatron.products import settle_products
from nemocascade.megatron.user_buffers import user_buffers
from nemocascade.megatron.warm_up import warm_up
from nemocascade.megatron.world import meet_ranks, start_world
from nemocascade.plan.devices import check_together, job_here
from nemocascade.plan.preflight import problems_before
from nemocascade.recipe import (
    DataConfig,
    EngineConfig,
    MoeTrainingConfig,
    ParallelConfig,
    RecipeError,
    RolloutConfig,
    SftRecipe,
)
from nemocascade.recipe.rl import PolicyRecipe
from nemocascade.recipe.train import Moments
from nemocascade.rollout.live import LiveEngine
from nemocascade.runtime.files import write_text
from nemocascade.runtime.launcher import world_size_of_environment
from nemocascade.runtime.logging import FILE_ONLY, LOGGER, Console, start_logging
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.row_files import is_built
from nemocascade.runtime.run_lock import RunLock, end_by_exception_on_sigterm
from nemocascade.runtime.stopping import StopRequest
from nemocascade.runtime.watchdog import Watchdog, job_store
from nemocascade.runtime.world import World, main_first
from nemocascade.train.checkpointing import rejected_changes
from nemocascade.types import Artifact

LOG_S = 60.0
"""Seconds between lines of the log about long work of the main rank."""


@contextmanager
def stage_world(
    recipe: SftRecipe | PolicyRecipe, *, trains: bool = True, console: Console | None = None
) -> Iterator[tuple[World, Accelerators]]:
    """Check the recipe, join the process groups, own the run folder, and leave all at the end.

    trains: False for a job that only reads, which does not own its folder. console: of the cascade,
    whose terminal shows the accelerators and the preflight of a layout once.

    Raises RecipeError with every invalid setting, before any process group exists, and
    FolderInUseError, before anything is written, if another job owns the run folder.
    """
    size = world_size_of_environment()
    check = problems_before(recipe, size) if recipe.engine.preflight else recipe.problems(size)
    if check := check + rejected_changes(recipe):
        raise RecipeError(check)
    run_dir = Path(recipe.run_dir)
    lock = RunLock(run_dir) if trains else None
    moments = recipe.optimizer.moments
    with watched_world(run_dir, recipe.parallel, recipe.engine, lock, moments=moments) as joined:
        world, detected = joined
        console = console or Console()
        world = replace(world, console=console)
        for text in (world.describe(), f"accelerators:\n{detected.table()}"):
            LOGGER.info("%s", text, extra=None if console.is_new(text) else FILE_ONLY)
        engine = recipe.engine
        checks = f"{recipe.parallel} {engine.device} {engine.precision}"
        if engine.preflight and console.is_new(checks):
            # Devices and collectives are timed; every rank gets every problem.
            world.watch.enter("preflight")
            checked = check_together(recipe, world)
            LOGGER.info(checked.text())
            if checked.problems:
                raise RecipeError(checked.problems)
        found = detected.accelerators
        buffers: AbstractContextManager[None] = nullcontext()
        job = job_here(recipe, world.size) if world.device.type == "cuda" else None
        if job is not None:
            rows = job.capacity // job.parallel.cp
            found = warm_up(found, job.model, recipe.engine, world, rows)
            if found.te_overlap:
                buffers = user_buffers(world, job.model.hidden_size, rows)
        world.watch.enter("set-up")
        with buffers:
            yield world, found


@contextmanager
def watched_world(
    run_dir: Path,
    parallel: ParallelConfig,
    engine: EngineConfig,
    lock: RunLock | None = None,
    *,
    moments: Moments = "fp32",
) -> Iterator[tuple[World, Detection]]:
    """Join the process groups under a watchdog, with the log in RUN/log.txt, and leave them. The
    file RUN/stop asks the job to stop.

    lock: of the run folder, acquired by the main rank and released at the end. moments: precision
    of AdamW's.
    """
    try:
        with _joined(run_dir, parallel, engine, lock) as (world, watch):
            stop = StopRequest(run_dir, is_main=world.is_main, store=watch.store)
            world = replace(world, watch=watch, stop=stop)
            if lock is not None:
                main_first(world, lock.acquire, lambda: None)
            start_logging(run_dir, is_main=world.is_main)
            if lock is not None and lock.note:
                LOGGER.warning(lock.note)
            settle_products(run_dir, world, engine, keeps=lock is not None)
            detected = detect(engine, world.device, moments=moments)
            watch.enter("set-up")
            yield world, detected
    finally:
        if lock is not None:
            lock.release()


@contextmanager
def _joined(
    run_dir: Path,
    parallel: ParallelConfig,
    engine: EngineConfig,
    lock: RunLock | None,
    *,
    patience_s: float = 0.0,
) -> Iterator[tuple[World, Watchdog]]:
    """Join the process groups under a watchdog that names a rank from the start on, and leave them.

    lock: of the run folder, which the job will acquire. patience_s: collectives wait at least so
    long, for work that may take any time; a rank is then named only if it is silent.
    """
    patient = replace(engine, timeout_s=max(patience_s, engine.timeout_s))
    meeting = meet_ranks(patient)
    if lock is not None and meeting.rank == 0:
        end_by_exception_on_sigterm()
    watch = Watchdog(
        meeting.rank,
        meeting.size,
        store=job_store(meeting.store) if meeting.size > 1 else None,
        limit_s=0.8 * engine.timeout_s,
        stacks=run_dir / "stacks",
        stalls=not patience_s,
    )
    world: World | None = None
    try:
        watch.start()
        world = start_world(parallel, patient, meeting)
        yield world, watch
    except Exception as error:
        watch.fail(error)
        raise
    finally:
        watch.close()
        if world is not None:
            world.close()


def on_main_rank(lock: RunLock, engine: EngineConfig, work: Callable[[], Any]) -> Any:
    """Run `work()` on the main rank and return its result on every rank.

    It runs in a world of its own between stages. It may take any time, but a rank that dies or is
    stopped meanwhile is named. lock: of the run folder, acquired by the first call and held
    afterwards. The log goes to RUN/log.txt. A failure fails all ranks.
    """

    def prepare() -> None:
        lock.acquire()
        start_logging(lock.folder, is_main=True)
        if lock.note:
            LOGGER.warning(lock.note)
            lock.note = ""

    if world_size_of_environment() == 1:
        prepare()
        return work()
    results: list[Any] = []
    # The others wait while the main rank hashes data sets.
    joined = _joined(lock.folder, ParallelConfig(), engine, lock, patience_s=86_400)
    with joined as (world, watch):
        main_first(world, prepare, lambda: start_logging(lock.folder, is_main=False))
        watch.enter("between stages")
        main_first(world, lambda: results.append(work()), lambda: None)
        return world.broadcast_object(results[0] if results else None)


def open_frozen(
    artifact: Artifact,
    world: World,
    detected: Detection,
    tokenizer: Tokenizer,
    engine: EngineConfig,
    rollout: RolloutConfig,
    *,
    tool_calls: int,
) -> LiveEngine:
    """An engine on the weights of an artifact that is not trained. tool_calls: see `LiveEngine`.

    Raises an error if the tokenizer has more ids than the model has embeddings.
    """
    model = artifact_model(artifact)
    check_vocabulary(tokenizer, model.vocab_size)
    config = make_config(
        model, world.parallel, engine, MoeTrainingConfig(), seed=0, initialise=False
    )
    rows = max(rollout.max_prompt_tokens, rollout.prefill_tokens)
    usable = warm_up(detected.accelerators, model, engine, world, rows)
    chunks = build_model(world, config, usable)
    load_artifact_weights(artifact, world, chunks)
    return LiveEngine(
        world,
        chunks,
        slots=rollout.slots,
        kv_gib=rollout.kv_gib,
        kv_memory_fraction=rollout.kv_memory_fraction,
        prefill_tokens=rollout.prefill_tokens,
        prefill_chunk=rollout.prefill_chunk,
        decode=tokenizer.decode,
        vocabulary=tokenizer.vocab_size,
        tool_calls=tool_calls,
    )


def open_tokenizer(recipe: SftRecipe, world: World, start: Artifact | None = None) -> Tokenizer:
    """The recipe's tokenizer, otherwise that of `start`, the artifact it starts from; without an
    artifact, one is trained on its data at the first start.

    Raises RecipeError if the artifact has none, and an error if the tokenizer has more ids than the
    model has embeddings.
    """
    named = recipe.tokenizer.path
    if not named and start is not None:
        named = artifact_tokenizer(start)
    path = named or str(Path(recipe.run_dir) / "tokenizer.model")

    def prepare() -> Tokenizer:
        if not named and any(map(is_built, recipe.data.path)):
            raise DataError(NO_TOKENIZER)
        if not named and not Path(path).exists():
            LOGGER.info("training a tokenizer of %d ids", recipe.tokenizer.train_vocab_size)
            return train_tokenizer(
                recipe.data, recipe.tokenizer.train_vocab_size, path, seed=recipe.seed
            )
        return load_tokenizer(path)

    tokenizer: Tokenizer = main_first(world, prepare, lambda: load_tokenizer(path))
    check_vocabulary(tokenizer, recipe.model.vocab_size)
    LOGGER.info("tokenizer: %d ids, %s", tokenizer.vocab_size, path)
    return tokenizer


def artifact_tokenizer(artifact: Artifact) -> str:
    """Path of the tokenizer of the start artifact. Raises RecipeError if it has none."""
    path = artifact.tokenizer_path
    if path is None:
        raise RecipeError(
            [f"init_from({artifact.folder}) holds no tokenizer: name one with --tokenizer.path"]
        )
    return str(path)


def open_stage_data(recipe: SftRecipe, world: World, tokenizer: Tokenizer) -> StageData:
    """The recipe's documents, memory-mapped. The main rank tokenises those that are neither built
    nor cached, and reports its progress."""
    folder = recipe.data.cache_dir or str(Path(recipe.run_dir) / "cache")
    data: StageData = main_first(
        world,
        lambda: build_data(
            recipe.data, tokenizer, folder, seed=recipe.seed, progress=_reporter(world)
        ),
        lambda: open_data(recipe.data, tokenizer, folder, seed=recipe.seed),
    )
    LOGGER.info(
        "data: %d documents, held out %d", len(data.train), len(data.heldout) if data.heldout else 0
    )
    return data


def _reporter(world: World) -> Callable[[str], None]:
    """Reports the main rank's progress to the watchdog at once, and to the log every minute."""
    logged = time.monotonic()

    def report(progress: str) -> None:
        nonlocal logged
        world.watch.progress(progress)
        if time.monotonic() - logged >= LOG_S:
            logged = time.monotonic()
            LOGGER.info("%s", progress)

    return report


def heldout_loader(
    data: DataConfig, world: World, tokenizer: Tokenizer, documents: DocumentSet
) -> HeldoutLoader:
    """Loader of every document once, in as many micro-batches per rank as the schedule needs."""
    return HeldoutLoader(
        documents,
        data,
        dp_rank=world.dp_rank,
        dp_size=world.dp_size,
        cp_rank=world.cp_rank,
        cp_size=world.parallel.cp,
        pad_id=tokenizer.pad_id,
        microbatch_multiple=world.parallel.pp if world.parallel.vpp > 1 else 1,
    )


def write_recipe(recipe: Any, world: World) -> None:
    """Write the resolved recipe to RUN/recipe.json."""
    if world.is_main:
        text = json.dumps(asdict(recipe), indent=2) + "\n"
        write_text(Path(recipe.run_dir) / "recipe.json", text)
