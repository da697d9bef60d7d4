"""MOPD of Nemotron-3-Nano-30B-A3B, following Nemotron-Cascade 2 (arXiv 2603.19220).

128 prompts x 4 rollouts per step, 52 steps, AdamW (0.9, 0.95). The learning rate rises from 2e-7 to
2e-6 over 30 steps, which the paper calls important because the first gradients are large. Prompts:
math, instructions, tools, STEM and structured output at 30, 30, 10, 15 and 15 %, as released, and
one in six for preference, whose share is not published. On 128 GPUs, tp 8 leaves dp 16, and ep 8
uses the same ranks; rollouts on tp 1, ep 8.

The teacher for math is the SFT checkpoint, that for preference is RLHF from the SFT checkpoint. The
other domains use the best checkpoint after IF-RL and multi-domain RL. Name them with --teachers, or
let `cascade.py` choose by held-out scores. Rows for preference need the judge of `rlhf.py`.

    torchrun ... recipes/nemotron3_nano_30b/rlhf.py --envs.judge.url http://HOST:8000 \\
        --init-from runs/nemotron3_nano_30b/sft/artifact \\
        --run-dir runs/nemotron3_nano_30b/rlhf_teacher
    torchrun ... recipes/nemotron3_nano_30b/mopd.py --envs.judge.url http://HOST:8000
"""

from dataclasses import replace
from pathlib import Path

from nemocascade.recipe import (
    DomainConfig,
    GrpoRecipe,
    MopdConfig,
    MopdRecipe,
    TeacherConfig,
    ToolCallingConfig,
    load_recipe,
    nemotron3_nano_30b_stage,
)
from nemocascade.stages.launch import launch

DATA = ("data/mopd.jsonl",)
SFT = "runs/nemotron3_nano_30b/sft/artifact"
RLHF_TEACHER = "runs/nemotron3_nano_30b/rlhf_teacher/artifact"
MULTI = "runs/nemotron3_nano_30b/multi_domain_rl/artifact"
RLHF = load_recipe(Path(__file__).parent / "rlhf.py", GrpoRecipe)

BASE = nemotron3_nano_30b_stage(MopdRecipe)

RECIPE = replace(
    BASE,
    steps=52,
    run_dir="runs/nemotron3_nano_30b/mopd",
    init_from=MULTI,
    parallel=replace(BASE.parallel, tp=8),
    domains=(
        DomainConfig(domain="math", share=0.30, path=DATA, tasks=0),
        DomainConfig(domain="instruction_following", share=0.30, path=DATA, tasks=0),
        DomainConfig(domain="tool_calling", share=0.10, path=DATA, tasks=0),
        DomainConfig(domain="multiple_choice", share=0.15, path=DATA, tasks=0),
        DomainConfig(domain="structured_output", share=0.15, path=DATA, tasks=0),
        DomainConfig(domain="preference", share=0.20, path=RLHF.domains[0].path, tasks=0),
    ),
    teachers=(
        TeacherConfig("math", SFT),
        TeacherConfig("instruction_following", MULTI),
        TeacherConfig("tool_calling", MULTI),
        TeacherConfig("multiple_choice", MULTI),
        TeacherConfig("structured_output", MULTI),
        TeacherConfig("preference", RLHF_TEACHER),
    ),
    envs=replace(RLHF.envs, tool_calling=ToolCallingConfig("data/workplace_assistant")),
    # The loss uses no rewards, and verifying responses of up to 98,304 tokens is costly.
    mopd=MopdConfig(score_rollouts=False),
)

if __name__ == "__main__":
    launch(RECIPE)
