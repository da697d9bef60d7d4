"""MOPD of the small model: RL on mathematics forgets multiple choice, distillation wins it back.

The student comes from `math_rl.py`, which also teaches mathematics. No stage trains multiple
choice, so its teacher is the SFT checkpoint. In a cascade, the best held-out score decides.

    python recipes/small/mopd.py
"""

from dataclasses import replace
from pathlib import Path

from nemocascade.recipe import (
    DomainConfig,
    GrpoRecipe,
    MopdConfig,
    MopdRecipe,
    TeacherConfig,
    load_recipe,
    one_gpu_stage,
)
from nemocascade.stages.launch import launch

MATH = load_recipe(Path(__file__).parent / "math_rl.py", GrpoRecipe)
BASE = one_gpu_stage(MopdRecipe)
SFT, MATH_RL = "runs/small/sft/artifact", "runs/small/math_rl/artifact"

RECIPE = replace(
    BASE,
    steps=50,
    run_dir="runs/small/mopd",
    init_from=MATH_RL,
    domains=(*MATH.domains, DomainConfig(domain="multiple_choice")),
    teachers=(TeacherConfig("math", MATH_RL), TeacherConfig("multiple_choice", SFT)),
    rollout=replace(BASE.rollout, rollouts_per_prompt=4),
    mopd=MopdConfig(capacity=8192),
    optimizer=MATH.optimizer,
)

if __name__ == "__main__":
    launch(RECIPE)
