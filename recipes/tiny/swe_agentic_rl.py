"""Agentic SWE RL of the tiny model: GRPO on episodes that repair a file until its tests pass.

torchrun --nproc-per-node 2 recipes/tiny/domains_sft.py
torchrun --nproc-per-node 2 recipes/tiny/swe_agentic_rl.py
"""

from dataclasses import replace

from nemocascade.recipe import DomainConfig, GrpoConfig, GrpoRecipe, tiny_stage
from nemocascade.stages.launch import launch

BASE = tiny_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    steps=20,
    stage="swe_agentic_rl",
    run_dir="runs/tiny/swe_agentic_rl",
    domains=(DomainConfig(domain="swe_agentic", tasks=800),),
    rollout=replace(
        BASE.rollout,
        prompts_per_step=8,
        max_prompt_tokens=160,
        # Tool results count as response tokens.
        max_response_tokens=448,
        max_turns=4,
        # Same as in the paper: at temperature 1, long chains of small decisions fail too often.
        temperature=0.8,
    ),
    grpo=GrpoConfig(capacity=2048),
)

if __name__ == "__main__":
    launch(RECIPE)
