"""Startup of RL and MOPD stages: checks, world, policy, engine, environments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nemocascade.data.tokenizer import Tokenizer, check_vocabulary, load_artifact_tokenizer
from nemocascade.envs.registry import close_environments, domain_problems, make_environments
from nemocascade.megatron.artifact import artifact_model, read_artifact
from nemocascade.megatron.checkpoint.fingerprint import WeightFingerprint
from nemocascade.megatron.config import Accelerators
from nemocascade.megatron.replica import Replica, TrainingMemory
from nemocascade.megatron.world import generation_world, shares_weights
from nemocascade.recipe import ModelConfig, MopdRecipe, PolicyRecipe, RecipeError
from nemocascade.recipe.changes import rollout_settings
from nemocascade.rl.collector import Collector
from nemocascade.rl.journal import Journals
from nemocascade.rl.policy import PolicyRun, greedy_sampling, sequence_logprobs
from nemocascade.rl.prompts import encode_prompts
from nemocascade.rl.tasks import Task, TaskStream, read_tasks
from nemocascade.rl.trial import try_verifiers
from nemocascade.rl.verification import rank_envs, verifier_threads
from nemocascade.rl.win_rate import start_answers
from nemocascade.rollout.engine import Engine
from nemocascade.rollout.factory import open_engine
from nemocascade.rollout.live import LiveEngine
from nemocascade.runtime.launcher import world_size_of_environment
from nemocascade.runtime.logging import LOGGER, Console
from nemocascade.runtime.ray_cluster import program_slots
from nemocascade.runtime.stopping import StopAsked
from nemocascade.runtime.world import World, main_first
from nemocascade.stages.judge import check_judge, judge_on_ranks, probe_judge
from nemocascade.stages.setup import stage_world, write_recipe
from nemocascade.train.checkpointing import Checkpoints
from nemocascade.train.trainer import Trainer
from nemocascade.types import Artifact, Environment


@contextmanager
def policy_run[R: PolicyRecipe](
    recipe: R, check: Callable[[R], object] | None = None, console: Console | None = None
) -> Iterator[PolicyRun]:
    """Check the recipe, read the artifact it starts from, and resume if there is a checkpoint.

    check: further checks that raise RecipeError; called before any process group exists. console:
    of the cascade.
    """
    parent, model = _checked_start(recipe)
    if check is not None:
        check(recipe)
    check_judge(recipe.envs.judge, parent)
    with stage_world(recipe, console=console) as (world, accelerators):
        probe_judge(recipe.envs.judge, world)
        write_recipe(recipe, world)
        tokenizer = load_artifact_tokenizer(parent)
        check_vocabulary(tokenizer, model.vocab_size)
        policy = _open_policy(recipe, model, world, accelerators, tokenizer)
        judge = judge_on_ranks(
            recipe.envs.judge,
            parent,
            policy.rollout_world,
            policy.trainer.chunks,
            _judge_engine(recipe, policy),
            tokenizer,
            seed=recipe.seed,
        )
        every = make_environments(
            rank_envs(recipe.envs, policy.rollout_world, policy.engine), judge=judge
        )
        try:
            run = _assemble(recipe, parent, world, policy, every)
            try:
                greedy = greedy_sampling(recipe, run.collector)
                run.start_answers = start_answers(
                    run.collector, policy.trainer, parent, run.heldout, greedy
                )
                yield run
            except StopAsked:
                run.abandon_step()
        except Exception as error:
            # Report the failure first: closing verifiers waits for their current work.
            world.watch.fail(error)
            raise
        finally:
            close_environments(every)
            policy.engine.close()


def _checked_start(recipe: PolicyRecipe) -> tuple[Artifact, ModelConfig]:
    """The artifact that the stage starts from, and its shape.

    Raises RecipeError with every invalid setting, and CheckpointError if the artifact cannot be
    read.
    """
    problems = recipe.problems(world_size_of_environment())
    problems += domain_problems("domains", (d.domain for d in recipe.domains), recipe.envs.modules)
    if problems:
        raise RecipeError(problems)
    parent = read_artifact(Path(recipe.init_from))
    model = artifact_model(parent)
    problems = recipe.problems(world_size_of_environment(), model)
    if parent.tokenizer_path is None:
        problems.append(f"init_from({recipe.init_from}) holds no tokenizer: use another artifact")
    if problems:
        raise RecipeError(problems)
    return parent, model


@dataclass(frozen=True)
class _Policy:
    """A policy for training and sampling. rollout_world: the ranks in the generation layout, whose
    data-parallel ranks share the requests."""

    rollout_world: World
    trainer: Trainer
    engine: Engine
    tokenizer: Tokenizer


def _open_policy(
    recipe: PolicyRecipe,
    model: ModelConfig,
    world: World,
    accelerators: Accelerators,
    tokenizer: Tokenizer,
) -> _Policy:
    """Build the trainer, and the engine that samples its weights.

    The weights are undefined until `Checkpoints.start` reads those of the start or of a checkpoint.
    """
    trainer = Trainer(
        world,
        model,
        engine=recipe.engine,
        moe=recipe.moe,
        optimizer=recipe.optimizer,
        accelerators=accelerators,
        seed=recipe.seed,
        run_dir=Path(recipe.run_dir),
        lora=recipe.lora,
        initialise=False,
    )
    layout = recipe.rollout.layout.layout(recipe.parallel)
    rollout_world, replica = generation_world(world, layout, recipe.engine), None
    is_shared = shares_weights(world, rollout_world)
    if not is_shared:
        LOGGER.info("rollouts: %s", rollout_world.describe())
    # Weights with adapters are copied merged, also to the same layout.
    if not is_shared or (recipe.lora.rank and recipe.rollout.engine == "live"):
        replica = Replica(world, trainer.modules, rollout_world, model, recipe.engine, accelerators)
    engine = open_engine(
        world,
        trainer.modules,
        recipe.rollout,
        run_dir=Path(recipe.run_dir),
        decode=tokenizer.decode,
        vocabulary=tokenizer.vocab_size,
        logprobs=functools.partial(sequence_logprobs, recipe, trainer, tokenizer.pad_id),
        precision=recipe.engine.precision,
        rollout_world=rollout_world,
        replica=replica,
        training=TrainingMemory(trainer.chunks, trainer.optimizer, world.device),
        tool_calls=program_slots(recipe.envs.sandbox, world.size),
    )
    return _Policy(rollout_world, trainer, engine, tokenizer)


def _judge_engine(recipe: PolicyRecipe, policy: _Policy) -> Engine:
    """The engine of a judge that runs on the training ranks: one that reads their weights."""
    if isinstance(policy.engine, LiveEngine):
        return policy.engine
    return LiveEngine(
        policy.rollout_world,
        policy.trainer.modules,
        slots=recipe.rollout.slots,
        kv_gib=recipe.rollout.kv_gib,
        kv_memory_fraction=recipe.rollout.kv_memory_fraction,
        prefill_chunk=recipe.rollout.prefill_chunk,
        decode=policy.tokenizer.decode,
        vocabulary=policy.tokenizer.vocab_size,
    )


def _assemble(
    recipe: PolicyRecipe,
    parent: Artifact,
    world: World,
    policy: _Policy,
    every: Mapping[str, Environment],
) -> PolicyRun:
    """Assemble the run: its tasks, and the weights of the last checkpoint.

    every: environment by domain, including those of other stages.
    """
    tokenizer = policy.tokenizer
    environments = {d.domain: every[d.domain] for d in recipe.domains}
    stream = TaskStream(
        recipe.domains,
        environments,
        tokenizer,
        recipe.rollout,
        seed=recipe.seed,
        steps=recipe.steps,
        world=world,
    )
    collector = Collector(
        policy.rollout_world,
        policy.engine,
        tokenizer,
        environments,
        recipe.rollout,
        seed=recipe.seed,
        threads=verifier_threads(rank_envs(recipe.envs, policy.rollout_world, policy.engine)),
        journals=_journals(recipe, world, policy.trainer),
        limits={d.domain: d.max_response_tokens for d in recipe.domains},
    )
    heldout = _heldout_tasks(recipe, environments, tokenizer, world)
    if not isinstance(recipe, MopdRecipe) or recipe.mopd.score_rollouts:
        _try_verifiers(world, stream, heldout, environments)
    checkpoints = Checkpoints(Path(recipe.run_dir), recipe.checkpoint, world, recipe)
    if collector.journals is not None:
        checkpoints.on_saved = collector.journals.prune
    checkpoints.start(policy.trainer, stream, resume=recipe.resume, init_from=recipe.init_from)
    return PolicyRun(
        recipe=recipe,
        world=world,
        trainer=policy.trainer,
        tokenizer=tokenizer,
        engine=policy.engine,
        environments=environments,
        collector=collector,
        stream=stream,
        heldout=heldout,
        checkpoints=checkpoints,
        parent=parent,
        start_answers={},
    )


def _try_verifiers(
    world: World,
    stream: TaskStream,
    heldout: Sequence[Task],
    environments: Mapping[str, Environment],
) -> None:
    """Let the verifiers judge trial responses to the stage's prompts, on the main rank."""
    world.watch.enter("trial of the verifiers")
    prompts = [prompt for found in stream.prompts.values() for prompt in found.prompts]
    prompts += [task.prompt for task in heldout]
    main_first(world, lambda: try_verifiers(prompts, environments), lambda: None)


def _journals(recipe: PolicyRecipe, world: World, trainer: Trainer) -> Journals | None:
    """The journal of a run's rollouts, bound to the weights and the settings that decide them."""
    if not recipe.rollout.journal:
        return None
    fingerprint = WeightFingerprint(trainer.chunks, world)
    settings = rollout_settings(recipe)
    return Journals(
        Path(recipe.run_dir), world, lambda: {"weights": fingerprint.current(), **settings}
    )


def _heldout_tasks(
    recipe: PolicyRecipe,
    environments: dict[str, Environment],
    tokenizer: Tokenizer,
    world: World,
) -> list[Task]:
    tasks: list[Task] = []
    if not recipe.eval.prompts:
        return tasks
    for domain in recipe.domains:
        prompts = read_tasks(
            domain,
            environments,
            seed=recipe.seed,
            heldout=True,
            count=recipe.eval.prompts,
            domains=recipe.domains,
        )
        for prompt, ids in encode_prompts(prompts, tokenizer, recipe.rollout, world):
            tasks.append(Task(prompt, ids, len(tasks)))
    return tasks
