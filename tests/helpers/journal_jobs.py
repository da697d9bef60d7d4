"""Small GRPO and MOPD stages that are killed, stopped or undisturbed, on any number of ranks."""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

DOMAINS = ("instruction_following", "multiple_choice")


def start_and_teacher(folder: str) -> dict[str, str]:
    """Artifacts that stages start from, and that teaches them."""
    from helpers.start_policy import sft_recipe, start_policy
    from nemocascade.stages.sft import run_sft

    start = start_policy(f"{folder}/start", DOMAINS)
    other = sft_recipe(f"{folder}/teacher", DOMAINS)
    other = replace(other, steps=4, init_from=start)
    return {"start": start, "teacher": str(run_sft(other))}


def stage_recipe(kind: str, artifacts: dict[str, str], folder: str, **rollout: Any) -> Any:
    """A stage of two steps without checkpoints. kind: `grpo`, `plain` (GRPO without dynamic
    filtering) or `mopd`. Prompts could share prefills. The answers are junk, some of which keeps to
    some of the instructions."""
    from nemocascade.recipe import (
        CheckpointConfig,
        DomainConfig,
        EngineConfig,
        GrpoConfig,
        GrpoRecipe,
        LogConfig,
        MopdConfig,
        MopdRecipe,
        OptimizerConfig,
        RlEvalConfig,
        RolloutConfig,
        TeacherConfig,
    )
    from nemocascade.recipe.envs import EnvConfig

    common: dict[str, Any] = {
        "steps": 2,
        # Some group of each step can teach.
        "seed": 3,
        "run_dir": folder,
        "init_from": artifacts["start"],
        "rollout": replace(
            RolloutConfig(
                prompts_per_step=4,
                rollouts_per_prompt=4,
                max_prompt_tokens=96,
                max_response_tokens=12,
                thinking=False,
                slots=8,
                prefill_tokens=1000,
                dynamic_filtering=kind == "grpo",
            ),
            **rollout,
        ),
        "envs": EnvConfig(if_language_check="letters", if_grading="fraction", check_workers=1),
        "optimizer": OptimizerConfig(lr=1e-3, min_lr=0.0, warmup_steps=0, schedule="constant"),
        "engine": EngineConfig(precision="fp32", preflight=False),
        "checkpoint": CheckpointConfig(every=0),
        "eval": RlEvalConfig(prompts=4),
        "log": LogConfig(tensorboard=False),
    }
    if kind == "mopd":
        return MopdRecipe(
            domains=tuple(DomainConfig(domain=name, tasks=32) for name in DOMAINS),
            teachers=tuple(TeacherConfig(name, artifacts["teacher"]) for name in DOMAINS),
            mopd=MopdConfig(capacity=256),
            **common,
        )
    return GrpoRecipe(
        domains=(DomainConfig(domain=DOMAINS[0], tasks=64, difficulty=1),),
        grpo=GrpoConfig(capacity=256, kl_coef=0.1),
        **common,
    )


def run_and_hash(recipe: Any) -> dict[str, str]:
    """Run a stage; returns the hashes of its artifact's weights."""
    from nemocascade.stages.launch import run_stage

    return weight_hashes(run_stage(recipe))


def weight_hashes(artifact: Path) -> dict[str, str]:
    manifest = json.loads((artifact / "manifest.json").read_text())
    return {k: v["sha256"] for k, v in manifest["files"].items() if k.endswith(".safetensors")}


def metric_lines(folder: str) -> list[dict[str, Any]]:
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def before_append(name: str, number: int, action: Callable[[Any, bytes], object]) -> None:
    """Call `action(journal, record)` before this process appends record `number`, counted from 1,
    to the journal `name`, or `name-` and more. For the rest of the process."""
    from nemocascade.rl.journal import Journal
    from nemocascade.rl.rollout_records import record_bytes

    left = number
    append = Journal._append

    def counted(self: Any, kind: str, request: int, head: Any, data: Any = b"") -> None:
        nonlocal left
        is_it = self.folder.name.partition("-")[0] == name
        left -= is_it
        if left == 0 and is_it:
            named = {"kind": kind, "id": request, "key": self._key(request), **head}
            action(self, b"".join(record_bytes(named, data)))
        append(self, kind, request, head, data)

    Journal._append = counted  # type: ignore[method-assign, assignment]


def before_call(name: str, number: int, action: Callable[[], object]) -> None:
    """Call `action` before call `number`, counted from 1, of a function. For the rest of the
    process. name: "module:function" where it is used, or "module:Class.method"."""
    module, _, inside = name.partition(":")
    *outer, function = inside.split(".")
    holder = functools.reduce(getattr, outer, importlib.import_module(module))
    real, left = getattr(holder, function), number

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            action()
        return real(*arguments, **named)

    setattr(holder, function, counted)


def tear_and_die(journal: Any, record: bytes) -> None:
    """Append the first half of a record and die."""
    with journal._lock:
        file = journal._file or journal._open(journal._path(journal.world.rank))
        file.write(record[: len(record) // 2])
        file.flush()
        die()


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


_delay_s = [0.0]


def slow_generation(seconds: float) -> None:
    """Let every decode step take so much longer, until it is set to 0."""
    from nemocascade.rollout.generation import Generation

    _delay_s[0] = seconds
    decode = Generation._step
    if decode.__name__ == "slow":
        return

    def slow(self: Any, pass_: Any) -> None:
        time.sleep(_delay_s[0])
        decode(self, pass_)

    Generation._step = slow  # type: ignore[method-assign]
