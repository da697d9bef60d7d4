"""RL of Qwen3-30B-A3B on mathematics, with reasoning.

GRPO on rows with an `expected_answer`, or of GSM8K or MATH as published. 128 prompts x 16 rollouts
per step, strictly on-policy, AdamW (0.9, 0.95), learning rate 3e-6, no KL: the settings of
Nemotron-Cascade 2 (arXiv 2603.19220). Responses of up to 32,768 tokens and prompts of up to 8,192
are what the model card reserves of its context. On 64 GPUs, tp 4 leaves dp 16, and ep 8 uses the
same ranks; rollouts on tp 1, ep 8.

    torchrun ... recipes/qwen3_30b_a3b/math_rl.py
"""

from dataclasses import replace

from nemocascade.recipe import DomainConfig, GrpoRecipe, qwen3_30b_a3b_stage
from nemocascade.stages.launch import launch

BASE = qwen3_30b_a3b_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    stage="math_rl",
    run_dir="runs/qwen3_30b_a3b/math_rl",
    init_from="runs/qwen3_30b_a3b/sft/artifact",
    domains=(
        DomainConfig(
            domain="math",
            path=("data/math_rl.jsonl",),
            tasks=0,
            heldout_path=("data/heldout/math.jsonl",),
        ),
    ),
    grpo=replace(BASE.grpo, capacity=40_960),
)

if __name__ == "__main__":
    launch(RECIPE)
