"""A MOPD stage on every parallel layout, and resumed: rollouts and updates agree.

The quick tests omit layouts on which the stage of the other divergence, or that of
`test_grpo.py`, takes the same way; slow ones take these.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks
from helpers.start_policy import start_policy

LAYOUTS: dict[str, dict[str, int]] = {
    "TP2": {"tp": 2},
    "DP2": {},
    "EP2": {"ep": 2},
    "PP2": {"pp": 2},
    "CP2": {"cp": 2},
}
DIVERGENCES: dict[str, dict[str, Any]] = {
    "": {},
    "exact-": {"divergence": "reverse_kl"},
}
"""The prefix of a run's name, and its settings."""
RUNS = {
    f"{p}{name}": (layout, more)
    for name, layout in LAYOUTS.items()
    for p, more in DIVERGENCES.items()
}
QUICK = ("EP2", "PP2", "exact-TP2", "exact-PP2", "exact-CP2")
STEPS = 2
DOMAINS = ("instruction_following", "math")
EXACT = ("reward", "response_tokens", "trained_tokens")

Lines = list[dict[str, Any]]


def teach(artifact: str, teacher: str, folder: str, parallel: dict[str, Any], **more: Any) -> Lines:
    """metrics.jsonl of a stage with the start itself and `teacher` as teachers."""
    from nemocascade.recipe import (
        CheckpointConfig,
        DomainConfig,
        EngineConfig,
        LogConfig,
        MopdConfig,
        MopdRecipe,
        OptimizerConfig,
        ParallelConfig,
        RlEvalConfig,
        RolloutConfig,
        TeacherConfig,
    )
    from nemocascade.recipe.envs import EnvConfig
    from nemocascade.stages.mopd import run_mopd

    run_mopd(
        MopdRecipe(
            steps=more.get("steps", STEPS),
            run_dir=folder,
            init_from=artifact,
            domains=tuple(DomainConfig(domain=name, tasks=64) for name in DOMAINS),
            teachers=(TeacherConfig(DOMAINS[0], teacher), TeacherConfig(DOMAINS[1], artifact)),
            rollout=RolloutConfig(
                prompts_per_step=6,
                rollouts_per_prompt=2,
                max_prompt_tokens=96,
                max_response_tokens=12,
                thinking=False,
                slots=8,
                dynamic_filtering=False,
            ),
            mopd=MopdConfig(
                capacity=256,
                keep=more.get("keep", "host"),
                score_rollouts=more.get("scored", True),
                divergence=more.get("divergence", "sampled"),
            ),
            envs=EnvConfig(if_language_check="letters", check_workers=1),
            optimizer=OptimizerConfig(lr=1e-3, min_lr=0.0, warmup_steps=0, schedule="constant"),
            parallel=ParallelConfig(**parallel),
            engine=EngineConfig(precision="fp32", preflight=False),
            checkpoint=CheckpointConfig(every=0 if parallel else 1),
            eval=RlEvalConfig(prompts=4),
            log=LogConfig(tensorboard=False),
        )
    )
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def alone(folder: str) -> dict[str, Any]:
    """One process: a run, and the same run stopped after its first step, its teachers on disk."""
    artifact = start_policy(f"{folder}/sft", DOMAINS)
    teacher = f"{folder}/first/artifact"
    from dataclasses import replace

    from helpers.start_policy import sft_recipe

    from nemocascade.stages.sft import run_sft

    # Any other weights will do for a teacher.
    other = replace(sft_recipe(f"{folder}/first", DOMAINS), steps=4, init_from=artifact)
    run_sft(other)
    found: dict[str, Any] = {"artifact": artifact, "teacher": teacher}
    for prefix, more in DIVERGENCES.items():
        there = f"{folder}/{prefix}"
        found[f"{prefix}whole"] = teach(artifact, teacher, f"{there}whole", {}, **more)
        teach(artifact, teacher, f"{there}parts", {}, steps=1, **more)
        found[f"{prefix}parts"] = teach(
            artifact, teacher, f"{there}parts", {}, keep="disk", scored=False, **more
        )
    return found


def together(artifact: str, teacher: str, folder: str, names: list[str]) -> dict[str, Lines]:
    """Two ranks, run by run."""
    return {
        name: teach(artifact, teacher, f"{folder}/{name}", parallel, **more)
        for name, (parallel, more) in RUNS.items()
        if name in names
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("mopd"))
    (found,) = run_ranks(alone, 1, {"folder": folder}, timeout_s=300)
    found["folder"] = folder
    return {**found, **on_two_ranks(found, QUICK)}


def on_two_ranks(alone: dict[str, Any], names: Iterable[str]) -> dict[str, Lines]:
    arguments = {key: alone[key] for key in ("artifact", "teacher", "folder")}
    found: dict[str, Lines]
    found, _ = run_ranks(together, 2, {**arguments, "names": list(names)}, timeout_s=500)
    return found


@pytest.fixture(scope="module")
def others(runs: dict[str, Any]) -> dict[str, Lines]:
    """Runs that the quick tests omit."""
    return on_two_ranks(runs, RUNS.keys() - set(QUICK))


def test_each_domain_has_its_own_teacher(runs: dict[str, Any]) -> None:
    """At the first step the student is its own teacher of one domain, and not of the other."""
    first, second = runs["whole"]
    assert first["reverse_kl/math"] == pytest.approx(0, abs=1e-6)
    assert first["gated/math"] == 0
    assert abs(first["reverse_kl/instruction_following"]) > 1e-3
    assert first["importance/instruction_following"] == pytest.approx(1, abs=1e-3)
    assert first["grad_norm"] > 0
    assert second["reverse_kl/math"] != 0
    for line in runs["whole"]:
        assert line["mismatch_mean"] <= 1e-4
    manifest = json.loads((Path(runs["folder"]) / "whole/artifact/manifest.json").read_text())
    assert set(manifest["data"]["teachers"]) == set(DOMAINS)


def test_an_exact_divergence_is_0_from_the_student_itself(runs: dict[str, Any]) -> None:
    first, second = runs["exact-whole"]
    assert first["reverse_kl/math"] == pytest.approx(0, abs=1e-6)
    assert first["reverse_kl/instruction_following"] > 1e-3
    assert first["divergence"] > 0
    assert first["grad_norm"] > 0
    assert second["reverse_kl/math"] > 0
    for line in runs["exact-whole"]:
        assert line["mismatch_mean"] <= 1e-4


@pytest.mark.parametrize("name", QUICK)
def test_layout_equals_one_process(name: str, runs: dict[str, Any]) -> None:
    check_layout(name, runs[name], runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name not in QUICK])
def test_other_layout_equals_one_process(
    name: str, runs: dict[str, Any], others: dict[str, Lines]
) -> None:
    check_layout(name, others[name], runs)


def check_layout(name: str, lines: Lines, runs: dict[str, Any]) -> None:
    """The lines are those of one process with the same divergence."""
    prefix = "exact-" if name.startswith("exact-") else ""
    assert len(lines) == STEPS
    for ours, theirs in zip(lines, runs[f"{prefix}whole"], strict=True):
        for key in EXACT:
            assert ours[key] == theirs[key], (key, ours["step"])
        if "CP" in name and ours["step"] > 1:
            # The teachers' packs cut documents elsewhere. The advantages of the student's own
            # tokens, 0 in one process, are then roundings, which Adam's first step scales up.
            continue
        kinds = ("advantage", "reverse_kl", "importance", "divergence", "entropy")
        compared = [k for k in theirs if k.startswith(kinds)]
        for key in ("loss", "grad_norm", "logprob", *compared):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), (key, ours["step"])


@pytest.mark.parametrize("prefix", DIVERGENCES)
def test_a_stopped_run_goes_on_bit_for_bit(prefix: str, runs: dict[str, Any]) -> None:
    """Wherever the teachers wait, and scored or not. Their files are gone afterwards."""
    unscored = runs[f"{prefix}parts"][-1]
    assert unscored["reward"] is None
    assert unscored["verifier_errors"] == 0
    hashes = []
    for name in ("whole", "parts"):
        folder = Path(runs["folder"]) / f"{prefix}{name}"
        manifest = json.loads((folder / "artifact/manifest.json").read_text())
        weights = {k: v for k, v in manifest["files"].items() if k.endswith(".safetensors")}
        assert weights
        hashes.append(weights)
        assert not (folder / "teachers").exists()
    assert hashes[0] == hashes[1]
