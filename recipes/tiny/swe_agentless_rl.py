"""SWE RL without an agent, of the tiny model: GRPO on edits that must make the tests pass.

torchrun --nproc-per-node 2 recipes/tiny/domains_sft.py
torchrun --nproc-per-node 2 recipes/tiny/swe_agentless_rl.py
"""

from dataclasses import replace

from nemocascade.recipe import DomainConfig, GrpoConfig, GrpoRecipe, tiny_stage
from nemocascade.stages.launch import launch

BASE = tiny_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    steps=15,
    stage="swe_agentless_rl",
    run_dir="runs/tiny/swe_agentless_rl",
    domains=(DomainConfig(domain="swe_agentless", tasks=800),),
    rollout=replace(
        BASE.rollout,
        max_prompt_tokens=160,
        max_response_tokens=96,
        # Prompts without a passing repair do not train.
        min_best_reward=0.5,
    ),
    grpo=GrpoConfig(capacity=2048),
    optimizer=replace(BASE.optimizer, lr=3e-4, min_lr=3e-4),
)

if __name__ == "__main__":
    launch(RECIPE)
