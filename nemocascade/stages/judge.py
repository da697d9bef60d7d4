"""Judge setup of a stage: checks before the start, a probe question, an artifact's weights."""

from __future__ import annotations

from pathlib import Path

from nemocascade.data.tokenizer import Tokenizer, check_template
from nemocascade.envs.registry import judge_problems, judge_rejection
from nemocascade.megatron.artifact import read_artifact
from nemocascade.recipe import RecipeError
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.rl.artifact_judge import ArtifactJudge
from nemocascade.rollout.engine import Engine
from nemocascade.runtime.world import World, main_first
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
    swap: WeightSwap,
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    seed: int,
) -> ArtifactJudge | None:
    """The judge that runs on the training ranks; None if the settings name another kind.

    world: in the layout of the engine. swap: of the model whose weights the engine uses.
    """
    if settings.kind != "artifact":
        return None
    artifact = open_judge(settings, policy)
    check_template(artifact, tokenizer)
    return ArtifactJudge(settings, artifact, world, swap, engine, tokenizer, seed=seed)
