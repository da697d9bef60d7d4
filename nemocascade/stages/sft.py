"""Supervised fine-tuning on packed sequences."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from nemocascade.data.documents import StageData
from nemocascade.data.loader import HeldoutLoader, PackedLoader
from nemocascade.data.packing import WorkModel
from nemocascade.data.tokenizer import Tokenizer, check_template
from nemocascade.megatron.artifact import read_artifact_together
from nemocascade.megatron.parameters import count_parameters
from nemocascade.recipe import SftRecipe
from nemocascade.rl.demonstrations import with_demonstrations
from nemocascade.runtime.logging import LOGGER, Console
from nemocascade.runtime.world import World
from nemocascade.stages.setup import (
    heldout_loader,
    open_stage_data,
    open_tokenizer,
    stage_world,
    write_recipe,
)
from nemocascade.train.checkpointing import Checkpoints
from nemocascade.train.metrics import MetricsWriter, is_due, step_values
from nemocascade.train.trainer import Trainer


def run_sft(recipe: SftRecipe, console: Console | None = None) -> Path:
    """Train as the recipe says and return the artifact's folder. console: of the cascade.

    Raises RecipeError if settings are invalid, CheckpointError if a checkpoint cannot be read,
    and NonFiniteError if the loss or a gradient is not finite.
    """
    run_dir = Path(recipe.run_dir)
    with stage_world(recipe, console=console) as (world, accelerators):
        write_recipe(recipe, world)
        settings = recipe
        if recipe.demonstrations.domains:
            recipe = with_demonstrations(recipe, world)
        start = None
        if recipe.init_from:
            start = read_artifact_together(Path(recipe.init_from), world)
        tokenizer = open_tokenizer(recipe, world, start)
        if start is not None:
            check_template(start, tokenizer)
        data = open_stage_data(recipe, world, tokenizer)
        checkpoints = Checkpoints(run_dir, recipe.checkpoint, world, settings)
        loads = checkpoints.will_load(init_from=recipe.init_from)
        trainer = Trainer(
            world,
            recipe.model,
            engine=recipe.engine,
            moe=recipe.moe,
            optimizer=recipe.optimizer,
            accelerators=accelerators,
            seed=recipe.seed,
            run_dir=run_dir,
            lora=recipe.lora,
            initialise=not loads,
        )
        loader = _packed_loader(recipe, world, tokenizer, data)
        heldout = None
        if data.heldout is not None:
            heldout = heldout_loader(recipe.data, world, tokenizer, data.heldout)
        checkpoints.start(
            trainer, loader, resume=recipe.resume, init_from=recipe.init_from, artifact=start
        )
        heldout_loss = _train(recipe, world, trainer, loader, heldout, checkpoints)
        loader.close()
        scores = {} if heldout_loss is None else {"heldout_loss": heldout_loss}
        return checkpoints.write_artifact(
            trainer, recipe, "sft", tokenizer, _describe(recipe, data), scores
        )


def _packed_loader(
    recipe: SftRecipe, world: World, tokenizer: Tokenizer, data: StageData
) -> PackedLoader:
    """This rank's loader of the training documents."""
    shape = recipe.model
    return PackedLoader(
        data.train,
        recipe.data,
        seed=recipe.seed,
        dp_rank=world.dp_rank,
        dp_size=world.dp_size,
        cp_rank=world.cp_rank,
        cp_size=world.parallel.cp,
        pad_id=tokenizer.pad_id,
        # Packs of equal work let ranks finish together.
        work=WorkModel.of_transformer(
            count_parameters(shape).active,
            shape.pattern.count("*"),
            shape.num_heads * shape.head_dim,
        ),
    )


def _describe(recipe: SftRecipe, data: StageData) -> dict[str, Any]:
    """The manifest's entry about the data."""
    heldout = data.heldout
    return {
        "path": list(recipe.data.path),
        "documents": len(data.train),
        "tokens": int(data.train.lengths.sum()),
        "fingerprint": data.train.fingerprint,
        "heldout_documents": 0 if heldout is None else len(heldout),
        "heldout_fingerprint": None if heldout is None else heldout.fingerprint,
    }


def _train(
    recipe: SftRecipe,
    world: World,
    trainer: Trainer,
    loader: PackedLoader,
    heldout: HeldoutLoader | None,
    checkpoints: Checkpoints,
) -> float | None:
    """Run the training loop; returns the last held-out loss."""
    first = trainer.step_number
    writer = MetricsWriter(recipe, world, first)
    heldout_loss = None
    for step in range(first, recipe.steps):
        started = time.perf_counter()
        result = trainer.train_step(loader.next_step())
        seconds = time.perf_counter() - started
        last = step + 1 == recipe.steps
        values = step_values(result, recipe.optimizer.lr_at(step), seconds, world)
        if heldout is not None and (last or is_due(step, recipe.eval.every)):
            heldout_loss, _ = trainer.evaluate(heldout)
            values["heldout_loss"] = heldout_loss
        if last or is_due(step, recipe.log.every) or "heldout_loss" in values:
            values["checkpoint_blocked_s"] = checkpoints.take_blocked_s()
            writer.write(step, values)
        if last or is_due(step, recipe.checkpoint.every):
            checkpoints.save(trainer, loader)
        if not last:
            checkpoints.stop_if_asked(trainer, loader)
    if first >= recipe.steps:
        LOGGER.info("all %d steps are done already", recipe.steps)
        heldout_loss = trainer.evaluate(heldout)[0] if heldout is not None else None
    writer.close()
    return heldout_loss
