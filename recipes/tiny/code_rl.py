"""Code RL of the tiny model: GRPO on functions that must pass all of their hidden tests.

torchrun --nproc-per-node 2 recipes/tiny/domains_sft.py
torchrun --nproc-per-node 2 recipes/tiny/code_rl.py
"""

from dataclasses import replace

from nemocascade.recipe import DomainConfig, GrpoConfig, GrpoRecipe, tiny_stage
from nemocascade.stages.launch import launch

BASE = tiny_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    steps=15,
    stage="code_rl",
    run_dir="runs/tiny/code_rl",
    domains=(DomainConfig(domain="code", difficulty=1, tasks=800),),
    rollout=replace(
        BASE.rollout,
        max_prompt_tokens=96,
        max_response_tokens=48,
        overlong_filter=True,
        top_p=0.95,
    ),
    grpo=GrpoConfig(capacity=2048),
)

if __name__ == "__main__":
    launch(RECIPE)
