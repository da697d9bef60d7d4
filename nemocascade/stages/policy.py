"""How stages that train on rollouts start: checks, world, policy, engine, environments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nemocascade.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from nemocascade.envs.registry import DOMAINS, close_environments, make_environments
from nemocascade.megatron.artifact import artifact_model, read_artifact
from nemocascade.recipe import RecipeError
from nemocascade.recipe.rl import PolicyRecipe
from nemocascade.rl.collector import Collector
from nemocascade.rl.policy import PolicyRun, greedy_sampling
from nemocascade.rl.tasks import Task, TaskStream, encode_prompts, read_tasks
from nemocascade.rl.verification import verifier_threads
from nemocascade.rl.win_rate import start_answers
from nemocascade.rollout.live import LiveEngine
from nemocascade.runtime.world import world_size_of_environment
from nemocascade.stages.judge import check_judge, judge_on_ranks, probe_judge
from nemocascade.stages.setup import stage_world, write_recipe
from nemocascade.train.checkpointing import Checkpoints
from nemocascade.train.trainer import Trainer
from nemocascade.types import Environment


@contextmanager
def policy_run[R: PolicyRecipe](
    recipe: R, check: Callable[[R], object] | None = None
) -> Iterator[PolicyRun]:
    """Check the recipe, read the artifact it starts from, and resume if there is a checkpoint.

    check: raises RecipeError for what else cannot run; called before any process group is made.
    """
    problems = recipe.problems(world_size_of_environment())
    unknown = sorted({d.domain for d in recipe.domains} - set(DOMAINS))
    problems += [f"domains names {n!r}, known are {', '.join(DOMAINS)}" for n in unknown]
    if problems:
        raise RecipeError(problems)
    parent = read_artifact(Path(recipe.init_from))
    model = artifact_model(parent)
    problems = recipe.problems(world_size_of_environment(), model)
    if parent.tokenizer_path is None:
        problems.append(f"init_from({recipe.init_from}) holds no tokenizer: use another artifact")
    if problems:
        raise RecipeError(problems)
    if check is not None:
        check(recipe)
    settings = recipe.envs.judge
    check_judge(settings, parent)
    with stage_world(recipe) as (world, accelerators):
        probe_judge(settings, world)
        write_recipe(recipe, world)
        tokenizer = load_tokenizer(str(parent.tokenizer_path))
        check_vocabulary(tokenizer, model.vocab_size)
        trainer = Trainer(
            world,
            model,
            engine=recipe.engine,
            moe=recipe.moe,
            optimizer=recipe.optimizer,
            accelerators=accelerators,
            seed=recipe.seed,
            run_dir=Path(recipe.run_dir),
        )
        engine = LiveEngine(
            world,
            trainer.modules,
            slots=recipe.rollout.slots,
            prefill_tokens=recipe.rollout.prefill_tokens,
            prefill_chunk=recipe.rollout.prefill_chunk,
            decode=tokenizer.decode,
            vocabulary=tokenizer.vocab_size,
        )
        judge = judge_on_ranks(
            settings, parent, world, trainer.chunks, engine, tokenizer, seed=recipe.seed
        )
        every = make_environments(recipe.envs, judge=judge)
        try:
            environments: dict[str, Environment] = {
                d.domain: every[d.domain] for d in recipe.domains
            }
            stream = TaskStream(
                recipe.domains, environments, tokenizer, recipe.rollout, seed=recipe.seed
            )
            collector = Collector(
                world,
                engine,
                tokenizer,
                environments,
                recipe.rollout,
                seed=recipe.seed,
                threads=verifier_threads(settings),
            )
            heldout = _heldout_tasks(recipe, environments, tokenizer)
            checkpoints = Checkpoints(Path(recipe.run_dir), recipe.checkpoint, world)
            checkpoints.start(trainer, stream, resume=recipe.resume, init_from=recipe.init_from)
            yield PolicyRun(
                recipe=recipe,
                world=world,
                trainer=trainer,
                tokenizer=tokenizer,
                engine=engine,
                environments=environments,
                collector=collector,
                stream=stream,
                heldout=heldout,
                checkpoints=checkpoints,
                parent=parent,
                start_answers=start_answers(
                    collector, trainer, parent, heldout, greedy_sampling(recipe, collector)
                ),
            )
        except Exception as error:
            # Before verifiers are ended, which may take as long as what they work on.
            world.watch.fail(error)
            raise
        finally:
            close_environments(every)


def _heldout_tasks(
    recipe: PolicyRecipe, environments: dict[str, Environment], tokenizer: Tokenizer
) -> list[Task]:
    tasks: list[Task] = []
    if not recipe.eval.prompts:
        return tasks
    for domain in recipe.domains:
        prompts = read_tasks(
            domain,
            environments[domain.domain],
            seed=recipe.seed,
            heldout=True,
            count=recipe.eval.prompts,
        )
        for prompt, ids in encode_prompts(prompts, tokenizer, recipe.rollout):
            tasks.append(Task(prompt, ids, len(tasks)))
    return tasks
