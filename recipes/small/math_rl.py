"""RL of the small model on GSM8K: 32 prompts x 8 rollouts per step, strictly on-policy, no KL.

python recipes/small/sft.py
python recipes/small/math_rl.py
"""

from dataclasses import replace
from pathlib import Path

from nemocascade.recipe import (
    GrpoConfig,
    GrpoRecipe,
    OptimizerConfig,
    SftRecipe,
    load_recipe,
    one_gpu_stage,
)
from nemocascade.stages.launch import launch

SFT = load_recipe(Path(__file__).parent / "sft.py", SftRecipe)
BASE = one_gpu_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    stage="math_rl",
    run_dir="runs/small/math_rl",
    init_from="runs/small/sft/artifact",
    domains=(SFT.demonstrations.domains[0],),
    # A weak policy: many groups have no right answer, and draws replace them.
    rollout=replace(BASE.rollout, max_draws=8),
    grpo=GrpoConfig(capacity=8192),
    optimizer=OptimizerConfig(
        min_lr=5e-5, schedule="constant", warmup_steps=10, beta2=0.95, weight_decay=0.0
    ),
)

if __name__ == "__main__":
    launch(RECIPE)
