"""A cascade so small that it runs in seconds, and jobs that run it and kill it."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from nemocascade.cascade.run import Choice, run_cascade
from nemocascade.recipe import (
    CascadeRecipe,
    CheckpointConfig,
    DataConfig,
    DemonstrationConfig,
    DomainConfig,
    EngineConfig,
    EnvConfig,
    GrpoConfig,
    GrpoRecipe,
    LogConfig,
    MopdConfig,
    MopdRecipe,
    OptimizerConfig,
    ParallelConfig,
    RlEvalConfig,
    RolloutConfig,
    ScoreConfig,
    ScoredDomain,
    SftRecipe,
    StageConfig,
    TokenizerConfig,
    tiny,
)

DOMAINS = ("instruction_following", "math")
FP32 = EngineConfig(precision="fp32", preflight=False)
ENVS = EnvConfig(if_language_check="letters", if_grading="fraction")
CONSTANT = OptimizerConfig(lr=1e-3, min_lr=0.0, warmup_steps=0, schedule="constant")
SHARED: dict[str, Any] = {
    "optimizer": CONSTANT,
    "engine": FP32,
    "checkpoint": CheckpointConfig(every=1),
    "log": LogConfig(tensorboard=False),
}


def sft(**changes: Any) -> SftRecipe:
    recipe = SftRecipe(
        steps=24,
        model=replace(tiny(), pattern="M*E", hidden_size=64, vocab_size=512),
        data=DataConfig(capacity=512, sequences_per_step=2, balance_group=2),
        demonstrations=DemonstrationConfig(
            domains=tuple(DomainConfig(domain=d, tasks=64) for d in DOMAINS), heldout=8
        ),
        tokenizer=TokenizerConfig(train_vocab_size=400),
        **{**SHARED, "optimizer": replace(CONSTANT, lr=4e-3), "checkpoint": CheckpointConfig(12)},
    )
    return replace(recipe, **changes)


ROLLOUT = RolloutConfig(
    prompts_per_step=4,
    rollouts_per_prompt=4,
    max_prompt_tokens=96,
    max_response_tokens=12,
    thinking=False,
    slots=16,
    dynamic_filtering=False,
)


def rl(stage: str, domain: str = "instruction_following", **changes: Any) -> GrpoRecipe:
    recipe = GrpoRecipe(
        steps=2,
        stage=stage,
        domains=(DomainConfig(domain=domain, tasks=64),),
        rollout=ROLLOUT,
        grpo=GrpoConfig(capacity=256),
        envs=ENVS,
        eval=RlEvalConfig(prompts=0),
        **SHARED,
    )
    return replace(recipe, **changes)


def mopd(**changes: Any) -> MopdRecipe:
    recipe = MopdRecipe(
        steps=2,
        domains=tuple(DomainConfig(domain=d, tasks=64) for d in DOMAINS),
        rollout=replace(ROLLOUT, rollouts_per_prompt=2),
        mopd=MopdConfig(capacity=256),
        envs=ENVS,
        eval=RlEvalConfig(prompts=0),
        **SHARED,
    )
    return replace(recipe, **changes)


def small_cascade(run_dir: str, **changes: Any) -> CascadeRecipe:
    """SFT, RL, a teacher aside from SFT, distillation from the best so far, and RL again."""
    recipe = CascadeRecipe(
        run_dir=run_dir,
        stages=(
            StageConfig("sft", sft()),
            StageConfig("if_rl", rl("if_rl")),
            StageConfig("teacher", rl("teacher", "math"), start="sft", side=True),
            StageConfig("mopd", mopd()),
            StageConfig("last", rl("last", seed=3)),
        ),
        scores=ScoreConfig(
            domains=tuple(ScoredDomain(d) for d in DOMAINS),
            tasks=8,
            max_prompt_tokens=128,
            max_response_tokens=12,
            thinking=False,
            slots=16,
            envs=ENVS,
            engine=FP32,
        ),
    )
    return replace(recipe, **changes)


def with_recipe(cascade: CascadeRecipe, name: str, **changes: Any) -> CascadeRecipe:
    """The cascade with other settings of one stage."""
    stages = tuple(
        replace(s, recipe=replace(s.recipe, **changes)) if s.name == name else s
        for s in cascade.stages
    )
    return replace(cascade, stages=stages)


def digests(run_dir: str | Path) -> dict[str, str]:
    """Of the artifacts, by stage: equal digests are equal bits, and equal words of what made
    them."""
    return {
        p.parents[1].name: json.loads(p.read_text())["digest"]
        for p in sorted(Path(run_dir).glob("stages/*/artifact/manifest.json"))
    }


def kill_and_restart(root: str, kills: int, seed: int) -> dict[str, Any]:
    """The cascade undisturbed, then at the same place killed at random moments and restarted."""
    run_dir = Path(root, "run")
    started = time.monotonic()
    assert _end(_start(str(run_dir))) == 0
    whole_s = time.monotonic() - started
    run_dir.rename(Path(root, "whole"))
    moments = random.Random(seed)
    died = []
    for _ in range(kills):
        child = _start(str(run_dir))
        # Spread over the run; each restart has less left to do.
        time.sleep(moments.uniform(0.05, 2.5 * whole_s / kills))
        os.kill(child, signal.SIGKILL)
        died.append(_end(child) == -signal.SIGKILL)
    assert _end(_start(str(run_dir))) == 0
    return {
        "died": died,
        "whole": digests(Path(root, "whole")),
        "parts": digests(run_dir),
        "retired": [p.name for p in run_dir.glob("retired/*")],
    }


def _start(run_dir: str) -> int:
    """A child that runs the cascade, alone in a world of its own."""
    child = os.fork()
    if not child:
        _child(run_dir)
    return child


def _child(run_dir: str) -> NoReturn:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    try:
        run_cascade(small_cascade(run_dir))
    except BaseException as error:
        print(f"the cascade failed: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def _end(child: int) -> int:
    """Exit code; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def on_layouts(run_dir: str, layouts: dict[str, dict[str, int]]) -> dict[str, Any]:
    """The cascade with a parallel layout for each stage."""
    cascade = small_cascade(run_dir)
    for name, sizes in layouts.items():
        cascade = with_recipe(cascade, name, parallel=ParallelConfig(**sizes))
    run_cascade(cascade)
    once = digests(run_dir)
    run_cascade(cascade, Choice())
    return {"once": once, "again": digests(run_dir)}
