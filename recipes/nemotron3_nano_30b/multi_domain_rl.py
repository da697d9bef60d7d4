"""Multi-domain RL of Nemotron-3-Nano-30B-A3B, following Nemotron-Cascade 2 (arXiv 2603.19220).

GRPO on STEM multiple choice (55 %), tool calling (30 %) and structured output (15 %). 128 prompts x
16 rollouts per step, 70 steps, strictly on-policy, AdamW (0.9, 0.95), learning rate 3e-6, no KL. On
128 GPUs, tp 4 leaves dp 32, and ep 8 uses the same ranks; rollouts on tp 1, ep 8. Data: the
released rows of the stage.

    torchrun ... recipes/nemotron3_nano_30b/multi_domain_rl.py --init-from ARTIFACT
"""

from dataclasses import replace

from nemocascade.recipe import (
    DomainConfig,
    GrpoRecipe,
    ToolCallingConfig,
    nemotron3_nano_30b_stage,
)
from nemocascade.stages.launch import launch

BASE = nemotron3_nano_30b_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    steps=70,
    stage="multi_domain_rl",
    run_dir="runs/nemotron3_nano_30b/multi_domain_rl",
    domains=(
        DomainConfig(
            domain="multiple_choice", share=0.55, path=("data/multiple_choice.jsonl",), tasks=0
        ),
        DomainConfig(domain="tool_calling", share=0.30, path=("data/tool_calling.jsonl",), tasks=0),
        DomainConfig(
            domain="structured_output", share=0.15, path=("data/structured_output.jsonl",), tasks=0
        ),
    ),
    # The released rows are about these tables: csv_data of NeMo Gym's workplace_assistant.
    envs=replace(BASE.envs, tool_calling=ToolCallingConfig("data/workplace_assistant")),
    rollout=replace(BASE.rollout, overlong_filter=True),
    grpo=replace(BASE.grpo, capacity=81_920),
)

if __name__ == "__main__":
    launch(RECIPE)
