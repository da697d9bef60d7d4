r"""SWE RL without an agent, Nemotron-3-Nano-30B-A3B, following Nemotron-Cascade 2 (2603.19220).

GRPO on search/replace edits that repair a repository. The prompt holds an issue, the golden files
and the five files that BM25 retrieves. Rows with tests are graded by them, others by a reward
model. 128 prompts x 16 rollouts per step, 45 steps (the paper: 40 to 50), strictly on-policy, AdamW
(0.9, 0.95), learning rate 3e-6, no KL. Prompts with no rollout above 0.5 do not train. On 128 GPUs,
tp 8 leaves dp 16, and ep 8 uses the same ranks; rollouts on tp 1, ep 8. Data: the released rows of
the stage. The reward model runs on an OpenAI-compatible server. Packages that the repositories
import in their tests must be on the hosts: name them in `--envs.sandbox.packages`.

The paper filters out relatively easy samples and does not say how. Rows get a `pass_rate` from the
policy that the stage starts from; a repair counts as solved above the 0.5 of the loss's mask.
`--domains.0.drop_solved 1` drops those that are always solved.

    vllm serve openai/gpt-oss-120b
    torchrun ... --no-python nemocascade pass-rates ROWS.jsonl \\
        --recipe recipes/nemotron3_nano_30b/swe_agentless_rl.py --artifact A --samples 8 \\
        --solved-at 0.501 --envs.judge.url URL --output data/swe_agentless_rl.jsonl
    torchrun ... recipes/nemotron3_nano_30b/swe_agentless_rl.py --init-from A --envs.judge.url URL
"""

from dataclasses import replace

from nemocascade.recipe import (
    DomainConfig,
    EnvConfig,
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
    # Rows that were always solved are dropped; rows without a `pass_rate` are kept.
    domains=(
        DomainConfig(
            domain="swe_agentless",
            path=("data/swe_agentless_rl.jsonl",),
            tasks=0,
            drop_solved=1.0,
        ),
    ),
    # The paper does not say whether it filters overlong answers. It is off here: a truncated
    # repair counts as a failed one.
    rollout=replace(
        BASE.rollout, max_response_tokens=98_304, dynamic_filtering=False, min_best_reward=0.5
    ),
    grpo=replace(BASE.grpo, capacity=131_072),
    parallel=replace(BASE.parallel, tp=8),
    envs=EnvConfig(
        # The same limits as for agents: the tests are those of whole repositories.
        sandbox=SandboxConfig(
            time_s=600.0, memory_mib=8192, processes=64, output_kib=4096, scratch_mib=2048
        ),
        judge=JudgeConfig(kind="server", model="openai/gpt-oss-120b"),
    ),
)

if __name__ == "__main__":
    launch(RECIPE)
