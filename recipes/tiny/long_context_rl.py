"""Long-context RL of the tiny model: GRPO on questions over five documents, by exact answers.

torchrun --nproc-per-node 2 recipes/tiny/domains_sft.py
torchrun --nproc-per-node 2 recipes/tiny/long_context_rl.py
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
from nemocascade.stages.launch import launch

RECIPE = GrpoRecipe(
    steps=40,
    stage="long_context_rl",
    run_dir="runs/tiny/long_context_rl",
    init_from="runs/tiny/domains_sft/artifact",
    domains=(DomainConfig(domain="long_context", tasks=800),),
    rollout=RolloutConfig(
        prompts_per_step=16,
        rollouts_per_prompt=8,
        max_prompt_tokens=160,
        max_response_tokens=16,
        thinking=False,
        slots=128,
        prefill_tokens=2048,
        max_draws=2,
    ),
    grpo=GrpoConfig(capacity=2048),
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
