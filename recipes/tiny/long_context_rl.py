"""Long-context RL of the tiny model: GRPO on questions over five documents, by exact answers.

torchrun --nproc-per-node 2 recipes/tiny/domains_sft.py
torchrun --nproc-per-node 2 recipes/tiny/long_context_rl.py
"""

from dataclasses import replace

from nemocascade.recipe import DomainConfig, GrpoConfig, GrpoRecipe, tiny_stage
from nemocascade.stages.launch import launch

BASE = tiny_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    steps=40,
    stage="long_context_rl",
    run_dir="runs/tiny/long_context_rl",
    domains=(DomainConfig(domain="long_context", tasks=800),),
    rollout=replace(BASE.rollout, max_prompt_tokens=160, max_response_tokens=16),
    grpo=GrpoConfig(capacity=2048),
)

if __name__ == "__main__":
    launch(RECIPE)
