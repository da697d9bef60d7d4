"""RLHF of the tiny model: GRPO on comparisons of all pairs of a prompt's answers.

A rule judges; it knows which words a good answer has. The measure is the win rate against the
answers that the stage's start gives, 0.5 at the start.

    torchrun --nproc-per-node 2 recipes/tiny/domains_sft.py
    torchrun --nproc-per-node 2 recipes/tiny/rlhf.py
"""

from nemocascade.recipe import (
    CheckpointConfig,
    DomainConfig,
    EngineConfig,
    GrpoConfig,
    GrpoRecipe,
    OptimizerConfig,
    RolloutConfig,
)
from nemocascade.recipe.envs import EnvConfig
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.stages.launch import launch

RECIPE = GrpoRecipe(
    steps=15,
    stage="rlhf",
    run_dir="runs/tiny/rlhf",
    init_from="runs/tiny/domains_sft/artifact",
    domains=(DomainConfig(domain="preference", tasks=800),),
    rollout=RolloutConfig(
        prompts_per_step=16,
        rollouts_per_prompt=8,
        max_prompt_tokens=96,
        max_response_tokens=48,
        thinking=False,
        slots=128,
        prefill_tokens=2048,
        max_draws=2,
    ),
    grpo=GrpoConfig(kl_coef=0.03, capacity=2048),
    envs=EnvConfig(judge=JudgeConfig(kind="rule")),
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

if __name__ == "__main__":
    launch(RECIPE)
