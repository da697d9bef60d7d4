"""Long-context RL of Nemotron-3-Nano-30B-A3B, following Nemotron-Cascade 2 (arXiv 2603.19220).

GRPO on questions over at least five documents, with inputs of up to 32K tokens, graded by a judge.
128 prompts x 16 rollouts per step, 30 steps, strictly on-policy, AdamW (0.9, 0.95), learning rate
3e-6, no KL. On 128 GPUs, tp 4 leaves dp 32, and ep 8 uses the same ranks; rollouts on tp 1, ep 8.
Data: rows with `documents`, `question` and `answer`. The judge runs on an OpenAI-compatible server.

    vllm serve Qwen/Qwen3-235B-A22B-Instruct-2507 --tensor-parallel-size 8
    torchrun ... recipes/nemotron3_nano_30b/long_context_rl.py --init-from ARTIFACT \\
        --envs.judge.url http://HOST:8000
"""

from dataclasses import replace

from nemocascade.recipe import (
    DomainConfig,
    EnvConfig,
    GrpoRecipe,
    JudgeConfig,
    nemotron3_nano_30b_stage,
)
from nemocascade.stages.launch import launch

BASE = nemotron3_nano_30b_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    steps=30,
    stage="long_context_rl",
    run_dir="runs/nemotron3_nano_30b/long_context_rl",
    domains=(DomainConfig(domain="long_context", path=("data/long_context_rl.jsonl",), tasks=0),),
    # Groups with equal grades have zero advantage with or without filtering. Overlong filtering is
    # off, as in the paper's text; its table says otherwise.
    rollout=replace(BASE.rollout, dynamic_filtering=False),
    grpo=replace(BASE.grpo, capacity=81_920),
    envs=EnvConfig(judge=JudgeConfig(kind="server", model="Qwen/Qwen3-235B-A22B-Instruct-2507")),
)

if __name__ == "__main__":
    launch(RECIPE)
