"""Pass rates of rows: how often a policy solves each task, by the sampling of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from nemocascade.data.tokenizer import Tokenizer, load_artifact_tokenizer, load_tokenizer
from nemocascade.envs.registry import (
    close_environments,
    domain_problems,
    judge_problems,
    make_environments,
)
from nemocascade.megatron.accelerators import Detection
from nemocascade.megatron.artifact import artifact_model, read_artifact
from nemocascade.megatron.checkpoint.folder import file_sha256
from nemocascade.recipe import ParallelConfig, RecipeError, RolloutServerConfig
from nemocascade.recipe.pass_rates import PassRateSettings
from nemocascade.recipe.rl import RolloutConfig
from nemocascade.rl.collector import Collector
from nemocascade.rl.prompts import encode_prompts
from nemocascade.rl.row_rates import (
    RewardLog,
    RowTasks,
    Verdicts,
    open_journal,
    rates_of,
    read_row_tasks,
    sample_missing,
    write_rated,
)
from nemocascade.rl.tasks import Task
from nemocascade.rl.trial import try_verifiers
from nemocascade.rl.verification import rank_envs, verifier_threads
from nemocascade.rollout.engine import Engine
from nemocascade.rollout.server import ServerEngine
from nemocascade.rollout.servers import ServerError
from nemocascade.runtime.http import key_problem, read_key
from nemocascade.runtime.launcher import world_size_of_environment
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.run_lock import RunLock
from nemocascade.runtime.stopping import StopAsked, Stopped
from nemocascade.runtime.world import World, main_first
from nemocascade.stages.judge import check_judge, open_frozen_with_judge, probe_judge
from nemocascade.stages.setup import watched_world
from nemocascade.types import Artifact, Environment

WAIT_S = 10.0
"""Longest wait for the server's first answer."""


def run_pass_rates(settings: PassRateSettings) -> dict[str, Any]:
    """Sample, verify and write; returns counts for the user. Every rank calls it.

    Raises RecipeError for invalid settings, CheckpointError if the artifact cannot be read,
    DataError for rows that are not tasks, FolderInUseError if another job writes the same output,
    ServerError if the server fails, and Stopped if OUTPUT.progress/stop asks for it.
    """
    problems = settings.problems() + judge_problems(settings.envs.judge)
    problems += domain_problems("domains", settings.domains, settings.envs.modules)
    if fault := key_problem(read_key(settings.api_key_env)):
        problems.append(f"the key in api_key_env({settings.api_key_env}) {fault}")
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    artifact = read_artifact(Path(settings.artifact)) if settings.artifact else None
    if artifact is not None:
        if problems := _artifact_problems(settings, artifact):
            raise RecipeError(problems)
        check_judge(settings.envs.judge, artifact)
    folder = Path(f"{settings.output}.progress")
    parallel = _layout(settings) if artifact else ParallelConfig()
    with watched_world(folder, parallel, settings.engine, RunLock(folder)) as (world, detected):
        world.stop.interrupt.arm()
        probe_judge(settings.envs.judge, world)
        tokenizer = (
            load_artifact_tokenizer(artifact) if artifact else load_tokenizer(settings.tokenizer)
        )
        engine, judge = _open_policy(settings, artifact, world, detected, tokenizer)
        every = make_environments(rank_envs(settings.envs, world, engine), judge=judge)
        try:
            chosen: dict[str, Environment] = {n: every[n] for n in settings.domains or every}
            key = settings.key(
                artifact.digest if artifact else settings.model,
                tokenizer.fingerprint,
                file_sha256(Path(settings.rows)),
            )
            return _rate_rows(settings, key, folder, world, engine, tokenizer, chosen)
        except ServerError as error:
            raise ServerError(
                f"{error}: check --server and --model, and set --text True if the server "
                "exchanges text only; the same command resumes"
            ) from error
        except StopAsked:
            LOGGER.info("stopped on request: the same command resumes")
            raise Stopped(0, interrupted=world.stop.finish()) from None
        finally:
            world.stop.interrupt.disarm()
            close_environments(every)


def _layout(settings: PassRateSettings) -> ParallelConfig:
    """The layout of an artifact's policy, which is not trained."""
    return settings.rollout.parallel.layout(settings.parallel)


def _artifact_problems(settings: PassRateSettings, artifact: Artifact) -> list[str]:
    if artifact.tokenizer_path is None:
        return [f"artifact({settings.artifact}) holds no tokenizer: use another artifact"]
    p, size = _layout(settings), world_size_of_environment()
    sequences = max(1, p.data_parallel(size)) * p.pp
    model = artifact_model(artifact)
    return p.problems(model, size, capacity=None, sequences_per_step=sequences)


def _open_policy(
    settings: PassRateSettings,
    artifact: Artifact | None,
    world: World,
    detected: Detection,
    tokenizer: Tokenizer,
) -> tuple[Engine, Any]:
    """The engine, and the judge if that is an artifact on the same ranks."""
    if artifact is None:
        server = RolloutServerConfig(
            urls=(settings.server,),
            model=settings.model,
            concurrency=settings.rollout.slots or RolloutConfig.slots,
            timeout_s=settings.timeout_s,
            api_key_env=settings.api_key_env,
            wait_s=WAIT_S,
        )
        return ServerEngine(
            server,
            vocabulary=tokenizer.vocab_size,
            world=world,
            trains=False,
            codec=tokenizer if settings.text else None,
        ), None
    return open_frozen_with_judge(
        artifact,
        world,
        detected,
        tokenizer,
        settings.engine,
        settings.rollout,
        settings.envs,
        seed=settings.seed,
    )


def _rate_rows(
    settings: PassRateSettings,
    key: Mapping[str, Any],
    folder: Path,
    world: World,
    engine: Engine,
    tokenizer: Tokenizer,
    environments: Mapping[str, Environment],
) -> dict[str, Any]:
    """Sample what the journal does not have yet, then write the rows."""
    world.watch.enter("rows")
    rows, output = Path(settings.rows), Path(settings.output)
    tasks = read_row_tasks(rows, environments, output)
    # The number of a task, and with it every draw, depends on the row and the sample alone.
    asked: dict[int, Task] = {}
    for domain in environments:
        of_row = {p.source: n for n, p in tasks.prompts.items() if p.domain == domain}
        prompts = [tasks.prompts[n] for n in of_row.values()]
        for prompt, ids in encode_prompts(prompts, tokenizer, settings.rollout, world):
            asked[of_row[prompt.source]] = Task(prompt, ids, of_row[prompt.source])
    used = [task.prompt for task in asked.values()]
    main_first(world, lambda: try_verifiers(used, environments), lambda: None)
    known: Verdicts = world.broadcast_object(
        main_first(world, lambda: open_journal(folder, key), dict)
    )
    if known:
        LOGGER.info("%s: %d finished samples are not repeated", folder, len(known))
    collector = Collector(
        world,
        engine,
        tokenizer,
        environments,
        settings.rollout,
        seed=settings.seed,
        threads=verifier_threads(rank_envs(settings.envs, world, engine)),
    )
    with closing(RewardLog(folder, world.rank)) as journal:
        found = sample_missing(collector, asked, known, journal, samples=settings.samples)
    rewards: dict[int, list[float]] = {row: [] for row in asked}
    for (row, _), reward in sorted(found.items()):
        rewards[row].append(reward)
    rates = rates_of(rewards, settings.solved_at)
    written = world.broadcast_object(
        main_first(world, lambda: write_rated(rows, output, rates, tasks.bad), lambda: 0)
    )
    return _counts(settings, tasks, rates, written)


def _counts(
    settings: PassRateSettings,
    tasks: RowTasks,
    rates: Mapping[int, Mapping[str, Any]],
    written: int,
) -> dict[str, Any]:
    known = [r["pass_rate"] for r in rates.values() if r["pass_rate"] is not None]
    return {
        "output": settings.output,
        "rows": written,
        "bad_rows": len(tasks.bad),
        "too_long": len(tasks.prompts) - len(rates),
        "without_verdict": len(rates) - len(known),
        "solved_always": known.count(1.0),
        "solved_never": known.count(0.0),
        "pass_rate": sum(known) / len(known) if known else None,
    }
