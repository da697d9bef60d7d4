"""SWE RL without an agent, of the tiny model: GRPO on edits that must make the tests pass.

torchrun --nproc-per-node 2 recipes/tiny/domains_sft.py
torchrun --nproc-per-node 2 recipes/tiny/swe_agentless_rl.py
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
    steps=15,
    stage="swe_agentless_rl",
    run_dir="runs/tiny/swe_agentless_rl",
    init_from="runs/tiny/domains_sft/artifact",
    domains=(DomainConfig(domain="swe_agentless", tasks=800),),
    rollout=RolloutConfig(
        prompts_per_step=16,
        rollouts_per_prompt=8,
        max_prompt_tokens=160,
        max_response_tokens=96,
        thinking=False,
        slots=128,
        prefill_tokens=2048,
        max_draws=2,
        # Prompts without one repair that passes do not train.
        min_best_reward=0.5,
    ),
    grpo=GrpoConfig(capacity=2048),
    optimizer=OptimizerConfig(
        lr=3e-4,
        min_lr=3e-4,
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
