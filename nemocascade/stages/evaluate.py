"""Held-out loss of an artifact on any files, on any parallel layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nemocascade.data.tokenizer import check_template
from nemocascade.megatron.artifact import artifact_model, load_artifact_weights, read_artifact
from nemocascade.megatron.config import make_config
from nemocascade.megatron.model import build_model
from nemocascade.recipe import (
    MoeTrainingConfig,
    SftRecipe,
    TokenizerConfig,
)
from nemocascade.runtime.logging import LOGGER
from nemocascade.stages.settings import EvalSettings
from nemocascade.stages.setup import heldout_loader, open_stage_data, open_tokenizer, stage_world
from nemocascade.train.evaluation import heldout_loss


def run_eval(settings: EvalSettings) -> tuple[float, int]:
    """Compute the loss and the number of tokens in its mean.

    Raises CheckpointError, RecipeError or DataError if the artifact, the settings or the data are
    invalid.
    """
    artifact = read_artifact(Path(settings.artifact))
    tokenizer_path = artifact.tokenizer_path
    recipe = SftRecipe(
        steps=1,
        run_dir=settings.work_dir,
        model=artifact_model(artifact),
        data=settings.data,
        tokenizer=TokenizerConfig(path=str(tokenizer_path or "")),
        parallel=settings.parallel,
        # Preflight predicts the memory of training, which evaluation does not need.
        engine=replace(settings.engine, preflight=False),
    )
    with stage_world(recipe, trains=False) as (world, accelerators):
        tokenizer = open_tokenizer(recipe, world)
        check_template(artifact, tokenizer)
        scored = replace(recipe, data=replace(recipe.data, heldout_path=(), heldout_rows=0))
        data = open_stage_data(scored, world, tokenizer)
        config = make_config(
            recipe.model,
            world.parallel,
            recipe.engine,
            MoeTrainingConfig(),
            seed=0,
            initialise=False,
        )
        chunks = build_model(world, config, accelerators)
        load_artifact_weights(artifact, world, chunks)
        loader = heldout_loader(recipe.data, world, tokenizer, data.train)
        loss, tokens = heldout_loss(world, config, chunks, loader)
        LOGGER.info("%s: loss %.6f over %d tokens", settings.artifact, loss, tokens)
        return loss, tokens
