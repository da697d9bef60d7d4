"""Multi-domain RL of the tiny model: multiple choice, tool calling, structured output.

torchrun --nproc-per-node 2 recipes/tiny/domains_sft.py
torchrun --nproc-per-node 2 recipes/tiny/multi_domain_rl.py
"""

from nemocascade.recipe import (
    CheckpointConfig,
    DomainConfig,
    EngineConfig,
    GrpoConfig,
    GrpoRecipe,
    OptimizerConfig,
    RolloutConfig,
)
from nemocascade.stages.launch import launch

RECIPE = GrpoRecipe(
    steps=25,
    stage="multi_domain_rl",
    run_dir="runs/tiny/multi_domain_rl",
    init_from="runs/tiny/domains_sft/artifact",
    domains=(
        DomainConfig(domain="multiple_choice", share=0.40, tasks=800),
        DomainConfig(domain="tool_calling", share=0.40, tasks=800),
        DomainConfig(domain="structured_output", share=0.20, tasks=800),
    ),
    rollout=RolloutConfig(
        prompts_per_step=16,
        rollouts_per_prompt=8,
        max_prompt_tokens=128,
        max_response_tokens=96,
        thinking=False,
        slots=128,
        prefill_tokens=2048,
        max_draws=2,
        overlong_filter=True,
    ),
    grpo=GrpoConfig(capacity=2048),
    optimizer=OptimizerConfig(
        lr=5e-4,
        min_lr=5e-4,
        schedule="constant",
        warmup_steps=5,
        beta2=0.95,
        weight_decay=0.0,
    ),
    engine=EngineConfig(precision="fp32"),
    checkpoint=CheckpointConfig(every=0),
)

if __name__ == "__main__":
    launch(RECIPE)
