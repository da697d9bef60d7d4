"""MOPD of Qwen3-30B-A3B: RL on mathematics, and what it forgot of following instructions.

128 prompts x 4 rollouts per step, 52 steps, learning rate 2e-7 to 2e-6 over 30 steps: the settings
of Nemotron-Cascade 2 (arXiv 2603.19220, 4.4). The student and the teacher for mathematics are the
artifact of `math_rl.py`; that for instructions is the SFT checkpoint. On 64 GPUs, tp 4 leaves dp
16, and ep 8 uses the same ranks; rollouts on tp 1, ep 8.

    torchrun ... recipes/qwen3_30b_a3b/mopd.py
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
    qwen3_30b_a3b_stage,
)
from nemocascade.stages.launch import launch

MATH = load_recipe(Path(__file__).parent / "math_rl.py", GrpoRecipe)
BASE = qwen3_30b_a3b_stage(MopdRecipe)
SFT, MATH_RL = "runs/qwen3_30b_a3b/sft/artifact", "runs/qwen3_30b_a3b/math_rl/artifact"

RECIPE = replace(
    BASE,
    steps=52,
    run_dir="runs/qwen3_30b_a3b/mopd",
    init_from=MATH_RL,
    domains=(
        *MATH.domains,
        DomainConfig(
            domain="instruction_following",
            path=("data/if_rl.jsonl",),
            tasks=0,
            heldout_path=("data/heldout/instruction_following.jsonl",),
        ),
    ),
    teachers=(TeacherConfig("math", MATH_RL), TeacherConfig("instruction_following", SFT)),
    mopd=MopdConfig(capacity=40_960),
)

if __name__ == "__main__":
    launch(RECIPE)
