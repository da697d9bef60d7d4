r"""Code RL of Nemotron-3-Nano-30B-A3B, following Nemotron-Cascade 2 (arXiv 2603.19220).

GRPO on programs that must pass all of their hidden tests. 128 prompts x 16 rollouts per step, 22
steps, strictly on-policy, AdamW (0.9, 0.95), learning rate 3e-6, no KL. On 128 GPUs, tp 8 leaves dp
16, and ep 8 uses the same ranks; rollouts on tp 1, ep 8. Data: the released rows of the stage.
Programs run as in LiveCodeBench: its imports and recursion limit, 4 GiB, numpy, and numbers
compared exactly.

The paper drops the prompts that GPT-OSS-120B solves in 8 of 8 rollouts; 3,500 remain. Rows without
a `pass_rate` get one by this command, from a model on a server or from your own `--artifact`:

    nemocascade pass-rates ROWS.jsonl --recipe recipes/nemotron3_nano_30b/code_rl.py --samples 8 \
        --server http://host:8000 --model NAME --tokenizer FOLDER --output data/code_rl.jsonl
    torchrun ... recipes/nemotron3_nano_30b/code_rl.py --init-from ARTIFACT
"""

from dataclasses import replace

from nemocascade.recipe import (
    CodeConfig,
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
    steps=22,
    stage="code_rl",
    run_dir="runs/nemotron3_nano_30b/code_rl",
    # Rows that were solved 8 times out of 8 are dropped; rows without a `pass_rate` are kept.
    domains=(DomainConfig(domain="code", path=("data/code_rl.jsonl",), tasks=0, drop_solved=1.0),),
    rollout=replace(
        BASE.rollout,
        max_response_tokens=120_832,
        top_p=0.95,
        dynamic_filtering=False,
        overlong_filter=True,
    ),
    grpo=replace(BASE.grpo, capacity=155_648),
    parallel=replace(BASE.parallel, tp=8),
    envs=EnvConfig(
        sandbox=SandboxConfig(memory_mib=4096),
        code=CodeConfig(
            preamble="livecodebench", recursion_limit=50_000, numpy=True, decimals="exact"
        ),
    ),
)

if __name__ == "__main__":
    launch(RECIPE)
