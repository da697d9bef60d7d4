"""Recipe presets: settings shared by a model's stages. A script changes what its stage needs."""

from __future__ import annotations

from dataclasses import replace

from nemocascade.recipe.parallel import ParallelConfig, RolloutParallelConfig
from nemocascade.recipe.rl import GrpoRecipe, PolicyRecipe
from nemocascade.recipe.train import CheckpointConfig, EngineConfig, OptimizerConfig


def nemotron3_nano_30b_stage[R: PolicyRecipe](kind: type[R]) -> R:
    """An RL or MOPD stage of Nemotron-3-Nano-30B-A3B (Nemotron-Cascade 2, arXiv 2603.19220).

    The optimizer, the frozen router and the batch of 128 prompts are defaults of `kind`, which are
    the paper's, or the published Nano recipe's where the paper says nothing. Advantages leave one
    out as in that recipe. The layout is for packs of up to 80K tokens on 128 GPUs: tp 4 leaves dp
    32, and ep 8 uses the same ranks. Rollouts are generated on tp 1 and ep 8, the planner's choice
    for 64 to 256 GPUs.
    """
    recipe = kind()
    recipe = replace(
        recipe,
        rollout=replace(
            recipe.rollout, slots=128, parallel=RolloutParallelConfig(tp=1, pp=1, ep=8)
        ),
        parallel=ParallelConfig(tp=4, ep=8),
        checkpoint=CheckpointConfig(every=5),
    )
    if isinstance(recipe, GrpoRecipe):
        recipe = replace(recipe, grpo=replace(recipe.grpo, leave_one_out=True))
    return recipe


def qwen3_30b_a3b_stage[R: PolicyRecipe](kind: type[R]) -> R:
    """An RL or MOPD stage of Qwen3-30B-A3B.

    Qwen publishes no settings of its training stages, so the optimizer, the frozen router and the
    batch are defaults of `kind`, which are those of Nemotron-Cascade 2 (arXiv 2603.19220). Prompts
    of up to 8,192 tokens and responses of up to 32,768 are what the model card reserves of the
    context of 40,960. The layouts are the planner's choice for 64 GPUs.
    """
    recipe = kind()
    return replace(
        recipe,
        rollout=replace(
            recipe.rollout,
            max_prompt_tokens=8192,
            max_response_tokens=32_768,
            slots=128,
            parallel=RolloutParallelConfig(tp=1, pp=1, ep=8),
        ),
        parallel=ParallelConfig(tp=4, ep=8),
    )


def one_gpu_stage[R: PolicyRecipe](kind: type[R]) -> R:
    """An RL or MOPD stage of a model of up to 1 B parameters on short tasks without reasoning, such
    as GSM8K's, for one GPU or a patient CPU: 32 prompts x 8 rollouts of up to 512 tokens."""
    recipe = kind()
    return replace(
        recipe,
        rollout=replace(
            recipe.rollout,
            prompts_per_step=32,
            rollouts_per_prompt=8,
            max_prompt_tokens=512,
            max_response_tokens=512,
            thinking=False,
            slots=256,
        ),
    )


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
