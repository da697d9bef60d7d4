"""The whole cascade with the tiny model, for CPUs: about 15 minutes on two cores, no download.

SFT, then one RL stage after the other, with distillation (MOPD) in the middle, in the order of
Nemotron-Cascade 2 (arXiv 2603.19220). After each stage every domain is scored.

    nemocascade run recipes/tiny/cascade.py
    nemocascade run recipes/tiny/cascade.py --dry-run
    nemocascade run recipes/tiny/cascade.py --only mopd --stages.mopd.steps 40
    nemocascade report runs/tiny/cascade
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from nemocascade.cascade.launch import launch
from nemocascade.plan.job import load_recipe
from nemocascade.recipe import (
    AlarmConfig,
    CascadeRecipe,
    CheckpointConfig,
    EngineConfig,
    EnvConfig,
    RlEvalConfig,
    ScoreConfig,
    ScoredDomain,
    StageConfig,
)


def stage(name: str, **changes: Any) -> Any:
    """The recipe of a script beside this one. The cascade scores, so the stage itself need not."""
    recipe = load_recipe(Path(__file__).with_name(f"{name}.py"))
    if hasattr(recipe, "rollout"):
        changes = {"steps": 20, "eval": RlEvalConfig(prompts=0), **changes}
    return replace(recipe, checkpoint=CheckpointConfig(every=10), **changes)


SFT = stage("domains_sft")
# What an agent's tools answer counts too.
LIMITS = {"swe_agentic": 256}

RECIPE = CascadeRecipe(
    run_dir="runs/tiny/cascade",
    stages=(
        StageConfig("sft", SFT),
        StageConfig("if_rl", stage("if_rl")),
        StageConfig("multi_domain_rl", stage("multi_domain_rl")),
        StageConfig("mopd", stage("mopd", teachers=())),
        StageConfig("long_context_rl", stage("long_context_rl")),
        StageConfig("code_rl", stage("code_rl")),
        StageConfig("swe_agentless_rl", stage("swe_agentless_rl")),
        StageConfig("swe_agentic_rl", stage("swe_agentic_rl")),
    ),
    scores=ScoreConfig(
        domains=tuple(
            ScoredDomain(d.domain, max_response_tokens=LIMITS.get(d.domain, 0))
            for d in SFT.demonstrations.domains
        ),
        tasks=64,
        max_prompt_tokens=160,
        max_response_tokens=96,
        thinking=False,
        slots=128,
        envs=EnvConfig(if_language_check="letters"),
        engine=EngineConfig(precision="fp32"),
    ),
    # 64 tasks: a score is known to about 6 points.
    alarm=AlarmConfig(drop=15.0),
)

if __name__ == "__main__":
    launch(RECIPE)
