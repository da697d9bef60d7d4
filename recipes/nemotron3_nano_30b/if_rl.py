"""IF-RL of Nemotron-3-Nano-30B-A3B, following Nemotron-Cascade 2 (arXiv 2603.19220).

GRPO on instructions that rules verify. 128 prompts x 16 rollouts per step, 180 steps, strictly
on-policy, AdamW (0.9, 0.95), learning rate 3e-6, no KL. On 128 GPUs, tp 4 leaves dp 32, and ep 8
uses the same ranks; rollouts on tp 1, ep 8. Data: the released rows of the stage.

    torchrun ... recipes/nemotron3_nano_30b/if_rl.py --init-from ARTIFACT
"""

from dataclasses import replace

from nemocascade.recipe import DomainConfig, GrpoRecipe, nemotron3_nano_30b_stage
from nemocascade.stages.launch import launch

BASE = nemotron3_nano_30b_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    steps=180,
    stage="if_rl",
    run_dir="runs/nemotron3_nano_30b/if_rl",
    domains=(DomainConfig(domain="instruction_following", path=("data/if_rl.jsonl",), tasks=0),),
    # A truncated answer scores 0 and stays in the loss.
    rollout=replace(BASE.rollout, stop_properly_penalty_coef=0.0),
    grpo=replace(BASE.grpo, capacity=81_920),
)

if __name__ == "__main__":
    launch(RECIPE)
