"""RLHF of the tiny model: GRPO on comparisons of all pairs of a prompt's answers.

The judge is a rule that knows which words a good answer has. The metric is the win rate against the
answers of the stage's start, which begins at 0.5.

    torchrun --nproc-per-node 2 recipes/tiny/domains_sft.py
    torchrun --nproc-per-node 2 recipes/tiny/rlhf.py
"""

from dataclasses import replace

from nemocascade.recipe import DomainConfig, GrpoConfig, GrpoRecipe, tiny_stage
from nemocascade.stages.launch import launch

BASE = tiny_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    steps=15,
    stage="rlhf",
    run_dir="runs/tiny/rlhf",
    domains=(DomainConfig(domain="preference", tasks=800),),
    rollout=replace(BASE.rollout, max_prompt_tokens=96, max_response_tokens=48),
    grpo=GrpoConfig(kl_coef=0.03, capacity=2048),
)

if __name__ == "__main__":
    launch(RECIPE)
