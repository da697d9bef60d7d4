"""Long-context RL of Nemotron-3-Nano-30B-A3B: the numbers of Nemotron-Cascade 2 (2603.19220).

GRPO on questions over at least five documents, inputs of up to 32K tokens, graded by a judge: 128
prompts x 16 rollouts a step, 30 steps, strictly on-policy, AdamW (0.9, 0.95), learning rate 3e-6,
no KL. 128 GPUs: tp 8 leaves dp 16, and ep 8 on the same ranks. Data: rows with `documents`,
`question` and `answer`. The judge is a model on a server that speaks OpenAI's protocol; name yours.

    torchrun ... recipes/nemotron3_nano_30b/long_context_rl.py --init-from A --envs.judge.url URL
"""

from nemocascade.recipe import (
    CheckpointConfig,
    DomainConfig,
    EngineConfig,
    GrpoConfig,
    GrpoRecipe,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
)
from nemocascade.recipe.envs import EnvConfig
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.stages.launch import launch

RECIPE = GrpoRecipe(
    steps=30,
    stage="long_context_rl",
    run_dir="runs/nemotron3_nano_30b/long_context_rl",
    domains=(DomainConfig(domain="long_context", path=("data/long_context_rl.jsonl",), tasks=0),),
    rollout=RolloutConfig(
        prompts_per_step=128,
        rollouts_per_prompt=16,
        max_prompt_tokens=32_768,
        max_response_tokens=49_152,
        temperature=1.0,
        top_p=1.0,
        thinking=True,
        slots=128,
        # Groups whose grades are all equal have no advantage either way. The paper's table has
        # overlong filtering, its text none: here as in the text.
        dynamic_filtering=False,
        overlong_filter=False,
    ),
    grpo=GrpoConfig(normalize="batch", kl_coef=0.0, capacity=81_920),
    envs=EnvConfig(
        judge=JudgeConfig(
            kind="server", url="http://localhost:8000", model="judge", temperature=0.6, top_p=0.95
        )
    ),
    optimizer=OptimizerConfig(
        lr=3e-6,
        min_lr=3e-6,
        schedule="constant",
        warmup_steps=0,
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.0,
        clip_grad=1.0,
    ),
    moe=MoeTrainingConfig(load_balance="none", freeze_router=True, bias_update_rate=1e-3),
    parallel=ParallelConfig(tp=8, ep=8),
    engine=EngineConfig(precision="bf16", recompute=True),
    checkpoint=CheckpointConfig(every=5),
)

if __name__ == "__main__":
    launch(RECIPE)
