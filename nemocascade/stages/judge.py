"""Judge setup of a stage: checks before the start, a probe question, an artifact's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemocascade.data.tokenizer import Tokenizer, check_template
from nemocascade.envs.registry import judge_problems, judge_rejection
from nemocascade.megatron.accelerators import Detection
from nemocascade.megatron.artifact import read_artifact
from nemocascade.recipe import EngineConfig, RecipeError, RolloutConfig
from nemocascade.recipe.envs import EnvConfig
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.rl.artifact_judge import ArtifactJudge
from nemocascade.rollout.engine import Engine
from nemocascade.rollout.live import LiveEngine
from nemocascade.runtime.ray_cluster import program_slots
from nemocascade.runtime.world import World, main_first
from nemocascade.stages.setup import open_frozen
from nemocascade.train.weight_swap import WeightSwap, model_problems
from nemocascade.types import Artifact


def open_judge(settings: JudgeConfig, policy: Artifact) -> Artifact:
    """Open the artifact of a judge.

    Raises CheckpointError if it cannot be read, and RecipeError naming both artifacts if its shape
    or tokenizer is not the policy's.
    """
    artifact = read_artifact(Path(settings.artifact))
    named = f"judge.artifact is {artifact.folder}"
    if problems := model_problems(named, artifact, "the policy's", policy):
        raise RecipeError(problems)
    return artifact


def check_judge(settings: JudgeConfig, policy: Artifact) -> None:
    """Check the judge's settings; needs no process group.

    Raises as `open_judge` for an unusable artifact, and RecipeError for invalid server settings.
    """
    if settings.kind == "artifact":
        open_judge(settings, policy)
    if settings.kind == "server" and (problems := judge_problems(settings)):
        raise RecipeError(problems)


def probe_judge(settings: JudgeConfig, world: World) -> None:
    """Ask a server one question before anything costly starts; every rank calls it.

    Raises RecipeError on the main rank, and MainRankError on the others, if the server rejects it:
    the address, the model's name, the key or the form of the question is wrong.
    """

    def probe() -> None:
        if reason := judge_rejection(settings):
            raise RecipeError(
                [
                    f"the judge rejects a question ({reason}): check envs.judge.url, "
                    "model, form, api_key_env and max_tokens"
                ]
            )

    if settings.kind == "server":
        world.watch.enter("judge: first question")
        main_first(world, probe, lambda: None)


def judge_on_ranks(
    settings: JudgeConfig,
    policy: Artifact,
    world: World,
    chunks: Sequence[Any],
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    seed: int,
) -> ArtifactJudge | None:
    """The judge that runs on the training ranks; None if the settings name another kind.

    world: in the layout of the engine. chunks: of the model whose weights the engine uses.
    """
    if settings.kind != "artifact":
        return None
    artifact = open_judge(settings, policy)
    check_template(artifact, tokenizer)
    swap = WeightSwap(world, chunks)
    return ArtifactJudge(settings, artifact, world, swap, engine, tokenizer, seed=seed)


def open_frozen_with_judge(
    artifact: Artifact,
    world: World,
    detected: Detection,
    tokenizer: Tokenizer,
    engine: EngineConfig,
    rollout: RolloutConfig,
    envs: EnvConfig,
    *,
    seed: int,
) -> tuple[LiveEngine, ArtifactJudge | None]:
    """An engine on the weights of an artifact that is not trained, see `open_frozen`, and the judge
    that shares its ranks; every rank calls it."""
    slots = program_slots(envs.sandbox, world.size)
    opened = open_frozen(artifact, world, detected, tokenizer, engine, rollout, tool_calls=slots)
    judge = judge_on_ranks(envs.judge, artifact, world, opened.chunks, opened, tokenizer, seed=seed)
    return opened, judge
