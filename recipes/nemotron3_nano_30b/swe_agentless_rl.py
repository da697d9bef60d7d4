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
from nemocascade.recipe.envs import EnvConfig, SandboxConfig
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.stages.launch import launch

RECIPE = GrpoRecipe(
    steps=45,
    stage="swe_agentless_rl",
    run_dir="runs/nemotron3_nano_30b/swe_agentless_rl",
    domains=(DomainConfig(domain="swe_agentless", path=("data/swe_agentless_rl.jsonl",), tasks=0),),
    rollout=RolloutConfig(
        prompts_per_step=128,
        rollouts_per_prompt=16,
        max_prompt_tokens=32_768,
        max_response_tokens=98_304,
        temperature=1.0,
        top_p=1.0,
        thinking=True,
        slots=128,
        # Unstated: what is not solved in time was not solved.
        overlong_filter=False,
        dynamic_filtering=False,
        min_best_reward=0.5,
    ),
    grpo=GrpoConfig(normalize="batch", kl_coef=0.0, capacity=131_072),
    envs=EnvConfig(
        # As for episodes of an agent: the tests are those of whole repositories.
        sandbox=SandboxConfig(
            time_s=600.0, memory_mib=8192, processes=64, output_kib=4096, scratch_mib=2048
        ),
        judge=JudgeConfig(
            kind="server", url="http://localhost:8000", model="judge", temperature=0.6, top_p=0.95
        ),
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
