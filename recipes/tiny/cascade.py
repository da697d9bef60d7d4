"""The full cascade with the tiny model, for CPUs: about 20 minutes on two cores, no download.

The order follows Nemotron-Cascade 2 (arXiv 2603.19220): SFT, then the RL stages, with distillation
(MOPD) in the middle. Two side stages train teachers of domains that no stage before MOPD trains.
After each stage, every domain is scored.

    torchrun --nproc-per-node 2 -m nemocascade.cli run recipes/tiny/cascade.py
    nemocascade run recipes/tiny/cascade.py --dry-run
    nemocascade run recipes/tiny/cascade.py --only rlhf --stages.rlhf.steps 40
    nemocascade report runs/tiny/cascade
"""

from dataclasses import replace
from pathlib import Path

from nemocascade.cascade.launch import launch
from nemocascade.recipe import (
    AlarmConfig,
    CascadeRecipe,
    CheckpointConfig,
    DomainConfig,
    EngineConfig,
    EnvConfig,
    GrpoRecipe,
    MopdRecipe,
    PolicyRecipe,
    RlEvalConfig,
    ScoreConfig,
    ScoredDomain,
    SftRecipe,
    StageConfig,
    load_recipe,
)

HERE = Path(__file__).parent


def policy[R: PolicyRecipe](kind: type[R], name: str, steps: int = 15) -> R:
    """Load a stage from its script, with fewer steps and without its own evaluation: the cascade
    scores it."""
    return replace(
        load_recipe(HERE / f"{name}.py", kind),
        steps=steps,
        checkpoint=CheckpointConfig(every=10),
        eval=RlEvalConfig(prompts=0),
    )


SFT = replace(
    load_recipe(HERE / "domains_sft.py", SftRecipe), checkpoint=CheckpointConfig(every=100)
)
IF, MULTI, RLHF, LONG = (
    policy(GrpoRecipe, name) for name in ("if_rl", "multi_domain_rl", "rlhf", "long_context_rl")
)
CODE = policy(GrpoRecipe, "code_rl", steps=12)
# Preference has a stage of its own after MOPD: a large KL coefficient and a decay stop its teacher
# halfway, wherever a seed begins.
RLHF_TEACHER = replace(
    RLHF,
    steps=10,
    grpo=replace(RLHF.grpo, kl_coef=0.75),
    optimizer=replace(
        RLHF.optimizer, schedule="linear", warmup_steps=0, min_lr=2e-5, decay_steps=10
    ),
)
# Code has a stage of its own after MOPD: few steps and a small share keep its teacher far from
# perfect.
MATH_CODE = replace(
    CODE,
    steps=7,
    domains=(
        DomainConfig("math", share=0.96, tasks=800),
        replace(CODE.domains[0], share=0.04),
    ),
)
AGENTLESS = policy(GrpoRecipe, "swe_agentless_rl", steps=12)
AGENTIC = policy(GrpoRecipe, "swe_agentic_rl", steps=16)
# The learning rate of the stage's own script would undo what the previous stage learnt.
AGENTIC = replace(AGENTIC, optimizer=replace(AGENTIC.optimizer, lr=3e-4, min_lr=3e-4))

# MOPD and the scores use the difficulty of each domain's own stage.
DIFFICULTY = {
    domain.domain: domain.difficulty
    for recipe in (IF, MULTI, RLHF, LONG, CODE, AGENTLESS, AGENTIC)
    for domain in recipe.domains
}
MOPD = policy(MopdRecipe, "mopd", steps=30)
# Most prompts are of domains whose teachers are side stages; the others keep what RL has trained.
# Few are of code, which has a stage of its own later.
SHARES = {
    "instruction_following": 0.18,
    "multiple_choice": 0.08,
    "tool_calling": 0.08,
    "structured_output": 0.08,
    "math": 0.28,
    "preference": 0.26,
    "code": 0.04,
}
MOPD = replace(
    MOPD,
    # The cascade chooses teachers by the scores of earlier artifacts.
    teachers=(),
    domains=tuple(
        DomainConfig(name, share=share, difficulty=DIFFICULTY.get(name, 0), tasks=800)
        for name, share in SHARES.items()
    ),
    rollout=replace(MOPD.rollout, max_prompt_tokens=160),
    # The decay lets the last steps converge. Change `decay_steps` together with `steps`.
    optimizer=replace(MOPD.optimizer, schedule="linear", min_lr=2e-5, decay_steps=MOPD.steps),
)
# Tool results count as response tokens. The agent's episodes cost as much as all other answers.
# Answers are sampled as in training: a greedy score jumps when a habit becomes rarer than its
# opposite, at a step that depends on the seed and on the processor.
LIMITS, TASKS = {"swe_agentic": 448}, {"swe_agentic": 64}

RECIPE = CascadeRecipe(
    run_dir="runs/tiny/cascade",
    stages=(
        StageConfig("sft", SFT),
        StageConfig("if_rl", IF),
        StageConfig("multi_domain_rl", MULTI),
        StageConfig("rlhf_teacher", RLHF_TEACHER, start="sft", side=True),
        StageConfig("math_code_teacher", MATH_CODE, start="sft", side=True),
        StageConfig("mopd", MOPD),
        StageConfig("rlhf", RLHF),
        StageConfig("long_context_rl", LONG),
        StageConfig("code_rl", CODE),
        StageConfig("swe_agentless_rl", AGENTLESS),
        StageConfig("swe_agentic_rl", AGENTIC),
    ),
    scores=ScoreConfig(
        domains=tuple(
            ScoredDomain(
                name,
                difficulty=DIFFICULTY.get(name, 0),
                max_response_tokens=LIMITS.get(name, 0),
                tasks=TASKS.get(name, 0),
            )
            # A domain may have demonstrations of several difficulties.
            for name in dict.fromkeys(d.domain for d in SFT.demonstrations.domains)
        ),
        tasks=128,
        max_prompt_tokens=160,
        max_response_tokens=96,
        temperature=1.0,
        thinking=False,
        slots=128,
        envs=EnvConfig(if_language_check="letters", if_tokenizer="rule", check_timeout_s=30.0),
        engine=EngineConfig(precision="fp32"),
    ),
    # With 128 tasks the error of a score is about 4 points, for the agent with 64 about 6.
    alarm=AlarmConfig(drop=15.0),
)

if __name__ == "__main__":
    launch(RECIPE)
