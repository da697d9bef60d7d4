"""The recipe of small RLHF stages."""

from __future__ import annotations

from typing import Any


def recipe(
    artifact: str, folder: str, judge: dict[str, Any], parallel: dict[str, Any], steps: int
) -> Any:
    from nemocascade.recipe import (
        CheckpointConfig,
        DomainConfig,
        EngineConfig,
        GrpoConfig,
        GrpoRecipe,
        OptimizerConfig,
        ParallelConfig,
        RlEvalConfig,
        RolloutConfig,
    )
    from nemocascade.recipe.envs import EnvConfig
    from nemocascade.recipe.judge import JudgeConfig

    return GrpoRecipe(
        steps=steps,
        run_dir=folder,
        init_from=artifact,
        domains=(DomainConfig(domain="preference", tasks=32),),
        rollout=RolloutConfig(
            prompts_per_step=4,
            rollouts_per_prompt=3,
            max_prompt_tokens=96,
            max_response_tokens=8,
            thinking=False,
            slots=8,
            dynamic_filtering=False,
        ),
        grpo=GrpoConfig(capacity=256, kl_coef=0.03),
        envs=EnvConfig(judge=JudgeConfig(**judge), check_workers=1),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=0.0, warmup_steps=0, schedule="constant"),
        parallel=ParallelConfig(**parallel),
        engine=EngineConfig(precision="fp32"),
        checkpoint=CheckpointConfig(every=1),
        eval=RlEvalConfig(prompts=4, every=1),
    )
