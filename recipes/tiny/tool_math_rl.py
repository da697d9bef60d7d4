"""RL of the tiny model on products of two-digit numbers, with the Python tool.

GRPO on episodes in which the model may run code in an interpreter and then answers. Greedy answers
of the start mostly do without a call and are wrong; the reward teaches it to call.

    torchrun --nproc-per-node 2 recipes/tiny/tool_math_sft.py
    torchrun --nproc-per-node 2 recipes/tiny/tool_math_rl.py
"""

from dataclasses import replace
from pathlib import Path

from nemocascade.recipe import (
    DomainConfig,
    EnvConfig,
    GrpoConfig,
    GrpoRecipe,
    SftRecipe,
    load_recipe,
    tiny_stage,
)
from nemocascade.stages.launch import launch

SFT = load_recipe(Path(__file__).parent / "tool_math_sft.py", SftRecipe)
BASE = tiny_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    steps=20,
    stage="tool_math_rl",
    run_dir="runs/tiny/tool_math_rl",
    init_from="runs/tiny/tool_math_sft/artifact",
    domains=(DomainConfig(domain="math", difficulty=4, tasks=800),),
    rollout=replace(BASE.rollout, max_prompt_tokens=64, max_response_tokens=96),
    envs=EnvConfig(python_tool=SFT.demonstrations.python_tool),
    grpo=GrpoConfig(capacity=2048),
)

if __name__ == "__main__":
    launch(RECIPE)
