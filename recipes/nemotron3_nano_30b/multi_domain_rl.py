"""Multi-domain RL of Nemotron-3-Nano-30B-A3B: the numbers of Nemotron-Cascade 2 (arXiv 2603.19220).

GRPO on STEM multiple choice (55 %), tool calling (30 %) and structured output (15 %): 128 prompts
x 16 rollouts a step, 70 steps, strictly on-policy, AdamW (0.9, 0.95), learning rate 3e-6, no KL.
128 GPUs: tp 8 leaves dp 16, and ep 8 on the same ranks. Data: the released rows of the stage.

    torchrun ... recipes/nemotron3_nano_30b/multi_domain_rl.py --init-from ARTIFACT
"""

from nemocascade.recipe import (
    CheckpointConfig,
    DomainConfig,
    EngineConfig,
    GrpoConfig,
    GrpoRecipe,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
)
from nemocascade.stages.launch import launch

RECIPE = GrpoRecipe(
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
    rollout=RolloutConfig(
        prompts_per_step=128,
        rollouts_per_prompt=16,
        max_prompt_tokens=32_768,
        max_response_tokens=49_152,
        temperature=1.0,
        top_p=1.0,
        thinking=True,
        slots=128,
        dynamic_filtering=True,
        overlong_filter=True,
    ),
    grpo=GrpoConfig(normalize="batch", kl_coef=0.0, capacity=81_920),
    optimizer=OptimizerConfig(
        lr=3e-6,
        min_lr=3e-6,
        schedule="constant",
        warmup_steps=0,
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.0,
        clip_grad=1.0,
    ),
    moe=MoeTrainingConfig(load_balance="none", freeze_router=True, bias_update_rate=1e-3),
    parallel=ParallelConfig(tp=8, ep=8),
    engine=EngineConfig(precision="bf16", recompute=True),
    checkpoint=CheckpointConfig(every=5),
)

if __name__ == "__main__":
    launch(RECIPE)
