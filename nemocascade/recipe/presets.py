"""Recipe presets: settings shared by a model's stages. A script changes what its stage needs."""

from __future__ import annotations

from dataclasses import replace

from nemocascade.recipe.parallel import ParallelConfig
from nemocascade.recipe.rl import GrpoRecipe, PolicyRecipe
from nemocascade.recipe.train import CheckpointConfig, EngineConfig, OptimizerConfig


def nemotron3_nano_30b_stage[R: PolicyRecipe](kind: type[R]) -> R:
    """An RL or MOPD stage of Nemotron-3-Nano-30B-A3B (Nemotron-Cascade 2, arXiv 2603.19220).

    The optimizer, the frozen router and the batch of 128 prompts are defaults of `kind`, which are
    the paper's, or the published Nano recipe's where the paper says nothing. Advantages leave one
    out as in that recipe. The layout is for packs of up to 80K tokens on 128 GPUs: tp 4 leaves dp
    32, and ep 8 uses the same ranks. A pipeline would train faster, but a decode step of the
    rollouts passes its stages one after another.
    """
    recipe = kind()
    recipe = replace(
        recipe,
        rollout=replace(recipe.rollout, slots=128),
        parallel=ParallelConfig(tp=4, ep=8),
        checkpoint=CheckpointConfig(every=5),
    )
    if isinstance(recipe, GrpoRecipe):
        recipe = replace(recipe, grpo=replace(recipe.grpo, leave_one_out=True))
    return recipe


def tiny_stage[R: PolicyRecipe](kind: type[R]) -> R:
    """An RL or MOPD stage of the tiny model, for CPUs; it starts from `recipes/tiny/domains_sft.py`
    and takes minutes."""
    recipe = kind()
    return replace(
        recipe,
        init_from="runs/tiny/domains_sft/artifact",
        rollout=replace(
            recipe.rollout,
            prompts_per_step=16,
            rollouts_per_prompt=8,
            thinking=False,
            slots=128,
            prefill_tokens=2048,
            max_draws=2,
        ),
        optimizer=OptimizerConfig(
            lr=5e-4,
            min_lr=5e-4,
            schedule="constant",
            warmup_steps=5,
            beta2=0.95,
            weight_decay=0.0,
        ),
        engine=EngineConfig(precision="fp32"),
        checkpoint=CheckpointConfig(every=0),
    )
