"""MOPD of the tiny model: checkpoints of the run restore what the student lost.

The student comes from multi-domain RL. The teacher of each domain is the checkpoint trained for it.
No stage trains math, so its teacher is the SFT checkpoint. In a cascade, the best held-out score
decides.

    torchrun --nproc-per-node 2 recipes/tiny/mopd.py --init-from runs/tiny/multi_domain_rl/artifact
"""

from dataclasses import replace

from nemocascade.recipe import (
    DomainConfig,
    EnvConfig,
    MopdConfig,
    MopdRecipe,
    RlEvalConfig,
    TeacherConfig,
    tiny_stage,
)
from nemocascade.stages.launch import launch

BASE = tiny_stage(MopdRecipe)
SFT = "runs/tiny/domains_sft/artifact"
IF_RL = "runs/tiny/if_rl/artifact"
MULTI = "runs/tiny/multi_domain_rl/artifact"

RECIPE = replace(
    BASE,
    steps=20,
    run_dir="runs/tiny/mopd",
    init_from=MULTI,
    domains=(
        DomainConfig(domain="math", share=0.30, tasks=800),
        DomainConfig(domain="instruction_following", share=0.30, tasks=800),
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
    rollout=replace(
        BASE.rollout,
        prompts_per_step=32,
        rollouts_per_prompt=4,
        max_prompt_tokens=128,
        max_response_tokens=96,
        max_draws=4,
    ),
    mopd=MopdConfig(capacity=2048),
    envs=EnvConfig(if_language_check="letters", if_tokenizer="rule"),
    optimizer=replace(BASE.optimizer, warmup_start_lr=5e-5),
    eval=RlEvalConfig(prompts=128),
)

if __name__ == "__main__":
    launch(RECIPE)
