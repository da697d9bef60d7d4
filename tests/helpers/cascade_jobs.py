"""A cascade so small that it runs in seconds, with jobs that run it and kill it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from nemocascade.cascade.errors import CascadeError
from nemocascade.cascade.graph import StageChoice, StageGraph
from nemocascade.cascade.interference import measure_interference
from nemocascade.cascade.lineage import report_text
from nemocascade.cascade.report import write_report
from nemocascade.cascade.run import dry_run, run_cascade
from nemocascade.recipe import (
    AlarmConfig,
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
from nemocascade.recipe.commands import InterferenceSettings

DOMAINS = ("instruction_following", "math")
FP32 = EngineConfig(precision="fp32", preflight=False)
# A check that a busy machine slows down must not become an error.
ENVS = EnvConfig(
    if_language_check="letters", if_grading="fraction", check_timeout_s=120.0, check_workers=1
)
CONSTANT = OptimizerConfig(lr=1e-3, min_lr=0.0, warmup_steps=0, schedule="constant")
SHARED: dict[str, Any] = {
    "optimizer": CONSTANT,
    "engine": FP32,
    "checkpoint": CheckpointConfig(every=1),
    "log": LogConfig(tensorboard=False),
}


def sft(**changes: Any) -> SftRecipe:
    recipe = SftRecipe(
        steps=12,
        model=replace(tiny(), pattern="M*E", hidden_size=64, vocab_size=512),
        data=DataConfig(capacity=512, sequences_per_step=2, balance_group=2),
        demonstrations=DemonstrationConfig(
            domains=tuple(DomainConfig(domain=d, tasks=64) for d in DOMAINS), heldout=8
        ),
        tokenizer=TokenizerConfig(train_vocab_size=400),
        **{**SHARED, "optimizer": replace(CONSTANT, lr=4e-3), "checkpoint": CheckpointConfig(6)},
    )
    return replace(recipe, **changes)


ROLLOUT = RolloutConfig(
    prompts_per_step=4,
    rollouts_per_prompt=8,
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
    """Digests of the artifacts by stage; equal ones have equal bits and equal manifests."""
    return digests_of(f"{run_dir}/stages")


def scenarios(root: str) -> dict[str, Any]:
    """A cascade from end to end, and what comes of changes afterwards, in one process."""
    run_dir = f"{root}/run"
    base = small_cascade(run_dir)
    found: dict[str, Any] = {"before": dry_run(base, StageChoice())}
    found["rejected"] = _error_of(base, StageChoice(only="if_rl"))
    started = time.monotonic()
    run_cascade(base)
    found |= {"first": digests(run_dir), "cascade": _json(run_dir, "cascade.json")}
    found["seconds"] = time.monotonic() - started
    found["report"] = report_text(Path(run_dir))
    names = StageGraph(base).names
    found["scores"] = {name: _json(run_dir, f"stages/{name}/scores.json") for name in names}
    found["leftovers"] = [str(p) for p in Path(run_dir).glob("stages/*/checkpoints")]

    found["kept"] = dry_run(base, StageChoice())
    found["taught again"] = dry_run(base, StageChoice(only="mopd", again=True))
    times = _times(run_dir)
    run_cascade(base)
    found["untouched"] = times == _times(run_dir)

    # Two stages change; of what comes after, only what depends on them runs.
    changed = with_recipe(base, "last", seed=11)
    found["change"] = dry_run(changed, StageChoice())
    run_cascade(changed)
    found |= {"changed": digests(run_dir), "retired": digests_of(f"{run_dir}/retired")}
    upstream = with_recipe(changed, "if_rl", steps=3)
    found["upstream"] = dry_run(upstream, StageChoice())
    found["from"] = dry_run(upstream, StageChoice(begin="mopd"))
    found["again"] = dry_run(changed, StageChoice(only="teacher", again=True))

    # Other held-out tasks are other scores, of the same artifacts.
    fewer = replace(changed, scores=replace(changed.scores, tasks=4))
    run_cascade(fewer)
    found["rescored"] = _json(run_dir, "stages/sft/scores.json")
    found["same"] = digests(run_dir)

    scores = _json(run_dir, "stages/sft/scores.json")
    scores["scores"]["math"]["score"] = 1.0
    Path(run_dir, "stages/sft/scores.json").write_text(json.dumps(scores))
    found["alarm"] = _error_of(
        replace(fewer, alarm=AlarmConfig(drop=50.0, stop=True)), StageChoice()
    )
    found["alarms"] = _json(run_dir, "cascade.json")["alarms"]

    next(Path(run_dir).glob("stages/last/artifact/*.safetensors")).unlink()
    found["damaged"] = dry_run(fewer, StageChoice(only="last"))
    return found


def branches(root: str) -> dict[str, Any]:
    """The interference of two stages of a cascade whose first one has run, twice."""
    run_dir = f"{root}/run"
    base = small_cascade(
        run_dir,
        stages=(
            StageConfig("sft", sft(steps=8)),
            StageConfig("if_rl", rl("if_rl", steps=1)),
            StageConfig("math_rl", rl("math_rl", "math", steps=1)),
        ),
    )
    run_cascade(base, StageChoice(only="sft"))
    run_cascade(base, StageChoice(only="if_rl"))
    settings = InterferenceSettings("", pairs=True)
    measure_interference(base, settings)
    found: dict[str, Any] = {
        "matrix": _json(run_dir, "interference/interference.json"),
        "artifacts": digests(f"{run_dir}/interference"),
        "cascade": _json(run_dir, "interference/cascade.json"),
        "main": digests(run_dir),
        "scores": {n: _json(run_dir, f"stages/{n}/scores.json") for n in ("sft", "if_rl")},
    }
    times = _times(f"{run_dir}/interference")
    measure_interference(base, settings)
    found["untouched"] = times == _times(f"{run_dir}/interference")
    write_report(Path(run_dir))
    found["page"] = Path(run_dir, "report/interference.html").read_text(encoding="utf-8")
    found["index"] = Path(run_dir, "report/index.html").read_text(encoding="utf-8")
    # Other scores of a measurement are not a reason to score the cascade anew.
    fewer = replace(base, scores=replace(base.scores, tasks=2))
    own = {n: Path(run_dir, n).read_bytes() for n in ("stages/sft/scores.json", "cascade.json")}
    measure_interference(fewer, InterferenceSettings("", stages=("if_rl",)))
    found["tasks"] = _json(run_dir, "interference/interference.json")["measured"]["base"]
    found["own_kept"] = {name: Path(run_dir, name).read_bytes() == own[name] for name in own}
    return found


def _error_of(cascade: CascadeRecipe, choice: StageChoice) -> str:
    try:
        run_cascade(cascade, choice)
    except CascadeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _json(run_dir: str, name: str) -> Any:
    return json.loads(Path(run_dir, name).read_text(encoding="utf-8"))


def _times(run_dir: str) -> dict[str, int]:
    """When each file of the stages was written, but for records that are made anew each time."""
    return {str(p): p.stat().st_mtime_ns for p in Path(run_dir, "stages").rglob("*") if p.is_file()}


def digests_of(folder: str) -> dict[str, str]:
    """Digests of the artifacts in the folders below this one."""
    return {
        p.parents[1].name: json.loads(p.read_text())["digest"]
        for p in sorted(Path(folder).glob("*/artifact/manifest.json"))
    }


def kill_and_restart(root: str, kills: int, seed: int, whole_s: float) -> dict[str, Any]:
    """The cascade of `scenarios` anew at the same place, killed at random moments and restarted.
    The first kill waits for a stage to have begun, so that it meets a run on any machine.

    whole_s: seconds of the cascade that nothing kills.
    """
    run_dir = Path(root, "run")
    shutil.rmtree(run_dir)
    moments = random.Random(seed)
    died = []
    for number in range(kills):
        child = _start(str(run_dir))
        if number:
            # Spread over the run; each restart has less left to do.
            time.sleep(moments.uniform(0.05, 1.4 * whole_s / kills))
        while not any(run_dir.glob("stages/*/metrics.jsonl")):
            time.sleep(0.05)
        os.kill(child, signal.SIGKILL)
        died.append(_end(child) == -signal.SIGKILL)
    assert _end(_start(str(run_dir))) == 0
    return {
        "died": died,
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


def on_layouts(run_dir: str, layouts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The cascade with a parallel layout for each stage, then once more."""
    cascade = small_cascade(run_dir)
    for name, sizes in layouts.items():
        cascade = with_recipe(cascade, name, parallel=ParallelConfig(**sizes))
    run_cascade(cascade)
    once, times = digests(run_dir), _times(run_dir)
    run_cascade(cascade)
    return {"once": once, "kept": times == _times(run_dir)}


def on_one(run_dir: str) -> str:
    """Decisions of one process about a cascade that more ranks have run."""
    return dry_run(small_cascade(run_dir), StageChoice())
