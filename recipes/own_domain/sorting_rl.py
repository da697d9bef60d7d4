"""RL of the tiny model on the domain of `sorting.py`."""

from dataclasses import replace

from nemocascade.recipe import DomainConfig, EnvConfig, GrpoConfig, GrpoRecipe, tiny_stage
from nemocascade.stages.launch import launch

BASE = tiny_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    steps=20,
    stage="sorting_rl",
    run_dir="runs/own_domain/sorting_rl",
    init_from="runs/own_domain/sorting_sft/artifact",
    domains=(DomainConfig(domain="sorting", difficulty=1, tasks=1200),),
    envs=EnvConfig(modules=("sorting",)),
    rollout=replace(BASE.rollout, max_prompt_tokens=64, max_response_tokens=16),
    grpo=GrpoConfig(capacity=2048),
)

if __name__ == "__main__":
    launch(RECIPE)
