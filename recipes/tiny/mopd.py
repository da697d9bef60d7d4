"""MOPD of the tiny model: the run's own checkpoints win back what the student lost.

The student comes from multi-domain RL. Each domain is taught by the checkpoint that was trained
for it; math, which no stage trains, by the SFT checkpoint. In a cascade the best held-out score
decides.

    torchrun --nproc-per-node 2 recipes/tiny/mopd.py --init-from runs/tiny/multi_domain_rl/artifact
"""

from nemocascade.recipe import (
    CheckpointConfig,
    DomainConfig,
    EngineConfig,
    EnvConfig,
    MopdConfig,
    MopdRecipe,
    OptimizerConfig,
    RlEvalConfig,
    RolloutConfig,
    TeacherConfig,
)
from nemocascade.stages.launch import launch

SFT = "runs/tiny/domains_sft/artifact"
IF_RL = "runs/tiny/if_rl/artifact"
MULTI = "runs/tiny/multi_domain_rl/artifact"

RECIPE = MopdRecipe(
    steps=20,
    run_dir="runs/tiny/mopd",
    init_from=MULTI,
    domains=(
        DomainConfig(domain="math", share=0.30, tasks=800),
        DomainConfig(domain="instruction_following", difficulty=1, share=0.30, tasks=800),
        DomainConfig(domain="tool_calling", share=0.10, tasks=800),
        DomainConfig(domain="multiple_choice", share=0.15, tasks=800),
        DomainConfig(domain="structured_output", share=0.15, tasks=800),
    ),
    teachers=(
        TeacherConfig("math", SFT),
        TeacherConfig("instruction_following", IF_RL),
        TeacherConfig("tool_calling", MULTI),
        TeacherConfig("multiple_choice", MULTI),
        TeacherConfig("structured_output", MULTI),
    ),
    rollout=RolloutConfig(
        prompts_per_step=32,
        rollouts_per_prompt=4,
        max_prompt_tokens=128,
        max_response_tokens=96,
        thinking=False,
        slots=128,
        prefill_tokens=2048,
        dynamic_filtering=False,
    ),
    mopd=MopdConfig(capacity=2048),
    envs=EnvConfig(if_language_check="letters"),
    optimizer=OptimizerConfig(
        lr=5e-4,
        min_lr=5e-4,
        schedule="constant",
        warmup_steps=5,
        warmup_start_lr=5e-5,
        beta2=0.95,
        weight_decay=0.0,
    ),
    engine=EngineConfig(precision="fp32"),
    checkpoint=CheckpointConfig(every=0),
    eval=RlEvalConfig(prompts=128),
)

if __name__ == "__main__":
    launch(RECIPE)
