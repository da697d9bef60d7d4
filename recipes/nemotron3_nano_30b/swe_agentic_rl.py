r"""Agentic SWE RL of Nemotron-3-Nano-30B-A3B, following Nemotron-Cascade 2 (arXiv 2603.19220).

GRPO on episodes in which an agent repairs a repository. 16 prompts x 64 rollouts per step, at most
200 turns in a context of 262,144 tokens, temperature 0.8, learning rate 3e-6 -> 0 after 10 steps of
warm-up. The reward is 1 if all hidden tests pass, else 0. Prompts that were always solved are
dropped, and 90 % of those never solved: rows need their `pass_rate`, of 16 rollouts of the policy
that the stage starts from. The number of steps and top-p are not published; here they are the
defaults, 100 and 1. On 128 GPUs, tp 2 x cp 8 leaves dp 8, and ep 8 uses the same ranks; rollouts on
tp 1, ep 8.

Tests run on the hosts of all ranks. Packages that the repositories import must be
installed there: name them in `--envs.sandbox.packages`.

    torchrun ... --no-python nemocascade pass-rates data/swe_agentic/rows.jsonl \
        --recipe recipes/nemotron3_nano_30b/swe_agentic_rl.py --artifact ARTIFACT --samples 16 \
        --output data/swe_agentic/tasks.jsonl
    torchrun ... recipes/nemotron3_nano_30b/swe_agentic_rl.py --init-from ARTIFACT
"""

from dataclasses import replace

from nemocascade.recipe import (
    DomainConfig,
    EnvConfig,
    GrpoRecipe,
    SandboxConfig,
    nemotron3_nano_30b_stage,
)
from nemocascade.stages.launch import launch

BASE = nemotron3_nano_30b_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    stage="swe_agentic_rl",
    run_dir="runs/nemotron3_nano_30b/swe_agentic_rl",
    domains=(
        DomainConfig(
            domain="swe_agentic",
            path=("data/swe_agentic/tasks.jsonl",),
            tasks=0,
            drop_solved=1.0,
            drop_unsolved=0.9,
        ),
    ),
    rollout=replace(
        BASE.rollout,
        prompts_per_step=16,
        rollouts_per_prompt=64,
        max_response_tokens=229_376,
        max_turns=200,
        temperature=0.8,
        slots=16,
        dynamic_filtering=False,
        samples=16,
        # The same as in SFT on agents' trajectories, and in the paper's evaluation.
        thinking=False,
    ),
    envs=EnvConfig(
        sandbox=SandboxConfig(
            time_s=600.0, memory_mib=8192, processes=64, output_kib=4096, scratch_mib=2048
        ),
    ),
    grpo=replace(BASE.grpo, capacity=262_144),
    optimizer=replace(BASE.optimizer, min_lr=0.0, schedule="linear", decay_steps=BASE.steps),
    parallel=replace(BASE.parallel, tp=2, cp=8),
)

if __name__ == "__main__":
    launch(RECIPE)
