"""Agentic SWE RL of the tiny model: GRPO on episodes that repair a file until its tests pass.

torchrun --nproc-per-node 2 recipes/tiny/domains_sft.py
torchrun --nproc-per-node 2 recipes/tiny/swe_agentic_rl.py
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
    steps=20,
    stage="swe_agentic_rl",
    run_dir="runs/tiny/swe_agentic_rl",
    init_from="runs/tiny/domains_sft/artifact",
    domains=(DomainConfig(domain="swe_agentic", tasks=800),),
    rollout=RolloutConfig(
        prompts_per_step=8,
        rollouts_per_prompt=8,
        max_prompt_tokens=160,
        # The answers of the tools count too.
        max_response_tokens=448,
        max_turns=4,
        # As the paper: many small decisions in a row go wrong too often at 1.
        temperature=0.8,
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
