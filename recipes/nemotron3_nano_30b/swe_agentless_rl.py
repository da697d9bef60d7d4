"""SWE RL without an agent of Nemotron-3-Nano-30B-A3B: Nemotron-Cascade 2 (arXiv 2603.19220).

GRPO on search/replace edits that repair a repository, from an issue, the golden files and the five
files that BM25 retrieves; graded by a reward model, or by tests where a row has them: 128 prompts x
16 rollouts a step, 45 steps (the paper: 40 to 50), strictly on-policy, AdamW (0.9, 0.95), learning
rate 3e-6, no KL. Prompts with no rollout above 0.5 do not train. 128 GPUs: tp 8 leaves dp 16, and
ep 8 on the same ranks. Data: the released rows of the stage. The reward model is on a server that
speaks OpenAI's protocol; name yours. What the repositories import for their tests must be on the
hosts: name it in `--envs.sandbox.packages`.

    torchrun ... recipes/nemotron3_nano_30b/swe_agentless_rl.py --init-from A --envs.judge.url URL
"""

from dataclasses import replace

from nemocascade.recipe import (
    DomainConfig,
    EnvConfig,
    GrpoConfig,
    GrpoRecipe,
    JudgeConfig,
    SandboxConfig,
    nemotron3_nano_30b_stage,
)
from nemocascade.stages.launch import launch

BASE = nemotron3_nano_30b_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    steps=45,
    stage="swe_agentless_rl",
    run_dir="runs/nemotron3_nano_30b/swe_agentless_rl",
    domains=(DomainConfig(domain="swe_agentless", path=("data/swe_agentless_rl.jsonl",), tasks=0),),
    # Overlong filtering is not published; it is off, because what is not solved in time was not
    # solved.
    rollout=replace(
        BASE.rollout, max_response_tokens=98_304, dynamic_filtering=False, min_best_reward=0.5
    ),
    grpo=GrpoConfig(capacity=131_072),
    envs=EnvConfig(
        # As for episodes of an agent: the tests are those of whole repositories.
        sandbox=SandboxConfig(
            time_s=600.0, memory_mib=8192, processes=64, output_kib=4096, scratch_mib=2048
        ),
        judge=JudgeConfig(kind="server", url="http://localhost:8000", model="judge"),
    ),
)

if __name__ == "__main__":
    launch(RECIPE)
