"""Long-context RL of Nemotron-3-Nano-30B-A3B: the numbers of Nemotron-Cascade 2 (2603.19220).

GRPO on questions over at least five documents, inputs of up to 32K tokens, graded by a judge: 128
prompts x 16 rollouts a step, 30 steps, strictly on-policy, AdamW (0.9, 0.95), learning rate 3e-6,
no KL. 128 GPUs: tp 8 leaves dp 16, and ep 8 on the same ranks. Data: rows with `documents`,
`question` and `answer`. The judge is a model on a server that speaks OpenAI's protocol; name yours.

    torchrun ... recipes/nemotron3_nano_30b/long_context_rl.py --init-from A --envs.judge.url URL
"""

from dataclasses import replace

from nemocascade.recipe import (
    DomainConfig,
    EnvConfig,
    GrpoConfig,
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
    # Groups whose grades are all equal have no advantage either way. The paper's table has
    # overlong filtering, its text none: here as in the text.
    rollout=replace(BASE.rollout, dynamic_filtering=False),
    grpo=GrpoConfig(capacity=81_920),
    envs=EnvConfig(judge=JudgeConfig(kind="server", url="http://localhost:8000", model="judge")),
)

if __name__ == "__main__":
    launch(RECIPE)
