"""Code RL of Nemotron-3-Nano-30B-A3B with the numbers of Nemotron-Cascade 2 (arXiv 2603.19220).

GRPO on programs that must pass all of their hidden tests: 128 prompts x 16 rollouts a step, 22
steps, strictly on-policy, AdamW (0.9, 0.95), learning rate 3e-6, no KL. 128 GPUs: tp 8 leaves dp
16, and ep 8 on the same ranks. Data: the released rows of the stage.

    torchrun ... recipes/nemotron3_nano_30b/code_rl.py --init-from ARTIFACT
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
    steps=22,
    stage="code_rl",
    run_dir="runs/nemotron3_nano_30b/code_rl",
    # Those solved 8 times of 8 are out; rows without a `pass_rate` stay.
    domains=(DomainConfig(domain="code", path=("data/code_rl.jsonl",), tasks=0, drop_solved=1.0),),
    rollout=RolloutConfig(
        prompts_per_step=128,
        rollouts_per_prompt=16,
        max_prompt_tokens=32_768,
        max_response_tokens=120_832,
        temperature=1.0,
        top_p=0.95,
        thinking=True,
        slots=128,
        dynamic_filtering=False,
        overlong_filter=True,
    ),
    grpo=GrpoConfig(normalize="batch", kl_coef=0.0, capacity=155_648),
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
