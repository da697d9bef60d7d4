"""RLHF of Nemotron-3-Nano-30B-A3B, following Nemotron-Cascade 2 (arXiv 2603.19220).

GRPO on comparisons by a generative reward model on its own server. All 120 pairs of a prompt's
answers are compared. 128 prompts x 16 rollouts per step, 25 steps, KL 0.03 to the stage's start,
strictly on-policy, AdamW (0.9, 0.95), learning rate 3e-6. The judge samples at temperature 0.6,
top-p 0.95. On 128 GPUs, tp 4 leaves dp 32, and ep 8 uses the same ranks; rollouts on tp 1, ep 8.
Data: the released rows of the stage, prompts without a ground truth.

The server must pass the roles response_1 and response_2 to the model's template, as vLLM does. Its
context must hold a prompt, two responses and the judge's reasoning.

    vllm serve nvidia/Qwen3-Nemotron-235B-A22B-GenRM --tensor-parallel-size 8 --max-model-len 98304
    torchrun ... recipes/nemotron3_nano_30b/rlhf.py --init-from ARTIFACT \\
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
    steps=25,
    stage="rlhf",
    run_dir="runs/nemotron3_nano_30b/rlhf",
    domains=(
        DomainConfig(
            domain="preference",
            path=("data/rlhf.jsonl",),
            tasks=0,
            heldout_path=("data/rlhf_heldout.jsonl",),
        ),
    ),
    # Rewards from comparisons are rarely all equal. Truncated answers stay in the loss, as in the
    # paper's text; its table says otherwise.
    rollout=replace(BASE.rollout, max_response_tokens=16_384, dynamic_filtering=False),
    grpo=replace(BASE.grpo, kl_coef=0.03, capacity=49_152),
    envs=EnvConfig(
        judge=JudgeConfig(
            kind="server",
            model="nvidia/Qwen3-Nemotron-235B-A22B-GenRM",
            form="response_roles",
        )
    ),
)

if __name__ == "__main__":
    launch(RECIPE)
