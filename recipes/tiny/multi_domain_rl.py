"""Multi-domain RL of the tiny model: multiple choice, tool calling, structured output.

torchrun --nproc-per-node 2 recipes/tiny/domains_sft.py
torchrun --nproc-per-node 2 recipes/tiny/multi_domain_rl.py
"""

from dataclasses import replace

from nemocascade.recipe import DomainConfig, GrpoConfig, GrpoRecipe, tiny_stage
from nemocascade.stages.launch import launch

BASE = tiny_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    steps=25,
    stage="multi_domain_rl",
    run_dir="runs/tiny/multi_domain_rl",
    domains=(
        DomainConfig(domain="multiple_choice", share=0.40, tasks=800),
        DomainConfig(domain="tool_calling", share=0.40, tasks=800),
        DomainConfig(domain="structured_output", share=0.20, tasks=800),
    ),
    rollout=replace(
        BASE.rollout, max_prompt_tokens=128, max_response_tokens=96, overlong_filter=True
    ),
    grpo=GrpoConfig(capacity=2048),
)

if __name__ == "__main__":
    launch(RECIPE)
