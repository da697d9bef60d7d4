"""RL of Qwen3-0.6B on GSM8K, for one GPU: 32 prompts x 8 rollouts per step, no KL.

It starts from the converted published model, or from the artifact of `sft.py`. AdamW (0.9, 0.95)
and the learning rate of 3e-6 are those of Nemotron-Cascade 2 (arXiv 2603.19220); batch and lengths
suit one GPU.

    nemocascade convert Qwen3-0.6B runs/qwen3_0_6b/base
    python recipes/qwen3_0_6b/math_rl.py
    python recipes/qwen3_0_6b/math_rl.py --init-from runs/qwen3_0_6b/sft/artifact
"""

from dataclasses import replace
from pathlib import Path

from nemocascade.recipe import GrpoConfig, GrpoRecipe, SftRecipe, load_recipe, one_gpu_stage
from nemocascade.stages.launch import launch

SFT = load_recipe(Path(__file__).parent / "sft.py", SftRecipe)
BASE = one_gpu_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    stage="math_rl",
    run_dir="runs/qwen3_0_6b/math_rl",
    init_from="runs/qwen3_0_6b/base",
    domains=SFT.demonstrations.domains,
    grpo=GrpoConfig(capacity=16_384),
)

if __name__ == "__main__":
    launch(RECIPE)
